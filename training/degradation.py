"""Simulates lighting, lens, sensor and compression of a robot's camera, for a batch of images on its device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Luminance quantisation of the JPEG standard (ITU-T T.81, table K.1).
_QUANTISATION = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99
"""


def degrade(draw: torch.Generator, images: Tensor, strength: Tensor) -> Tensor:
    """Return degraded images, quantised to 256 grey values.

    Args:
        images: (B, 1, H, W) in [0, 1].
        strength: (B,) 0 keeps an image unchanged; 1 includes images that people find hard to recognise.

    Returns:
        (B, 1, H, W) in [0, 1].
    """
    count, device = len(images), images.device
    strength = strength.view(-1, 1, 1, 1)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=draw, device=device)

    def normal() -> Tensor:
        return torch.randn(count, 1, 1, 1, generator=draw, device=device)

    def chance(probability: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=draw, device=device) < probability * strength.clamp(max=1)

    x = images
    # Lighting that changes over the image: lamps, shadows, vignetting.
    coarse = (torch.rand(count, 1, 3, 4, generator=draw, device=device) * 2 - 1) * 0.5 * strength
    light = F.interpolate(coarse, x.shape[2:], mode="bicubic", align_corners=True)
    x = torch.where(chance(0.4), x * light.exp(), x)
    x = torch.where(chance(0.8), x.clamp(1e-6, 1) ** (normal() * 0.35 * strength).exp(), x)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    contrast = (x - mean) * (normal() * 0.35 * strength).exp() + mean + normal() * 0.08 * strength
    x = torch.where(chance(0.8), contrast, x)
    less = coarser(draw, x)
    x = torch.where(chance(0.2), less, x)
    x = torch.where(chance(0.45), blurred(draw, x, strength), x)
    dark = chance(0.25)
    bright = chance(0.2) & ~dark
    exposure = torch.where(dark, (-normal().abs() * 1.2 * strength).exp(), torch.ones_like(strength))
    exposure = torch.where(bright, (normal().abs() * 0.35 * strength).exp(), exposure)
    x = (x * exposure).clamp(0, 1)
    read, shot = 0.012 * strength * normal().abs(), 0.03 * strength * normal().abs()
    noise = torch.randn(x.shape, generator=draw, device=device) * (read.square() + shot.square() * x).sqrt()
    x = torch.where(chance(0.7), x + noise, x)
    x = torch.where(dark, x * exposure.clamp(min=1e-3) ** -uniform(0, 1), x)
    x = _rounded(x)
    quality = uniform(95 - 75 * 1.0, 95)
    quality = 95 - (95 - quality) * strength.clamp(max=1)
    return torch.where(chance(0.4), _rounded(jpeg(x, quality)), x)


def _rounded(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round() / 255


def coarser(draw: torch.Generator, x: Tensor) -> Tensor:
    """Simulate a camera of lower resolution. It is the same for a whole batch, because a tensor has one size."""
    share = float(torch.rand((), generator=draw, device=x.device)) * 0.5 + 0.45
    # By size in both directions: a scale_factor is applied without rounding to whole pixels, and would shift the image.
    size = [round(length * share) for length in x.shape[2:]]
    less = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(less, x.shape[2:], mode="bilinear", align_corners=False)


def blurred(draw: torch.Generator, x: Tensor, strength: Tensor) -> Tensor:
    """Blur the images: half of them by defocus, half by motion."""
    count, device, reach = len(x), x.device, 5
    axis = torch.arange(-reach, reach + 1, device=device, dtype=torch.float32)
    columns, rows = torch.meshgrid(axis, axis, indexing="xy")
    angle = torch.rand(count, 1, 1, generator=draw, device=device) * math.pi
    flat = strength.view(-1, 1, 1)
    along = columns * angle.cos() + rows * angle.sin()
    across = -columns * angle.sin() + rows * angle.cos()
    half = 0.5 + 4.0 * flat.clamp(max=1) * torch.rand(count, 1, 1, generator=draw, device=device)
    moved = torch.sigmoid((half - along.abs()) / 0.25) * (-across.square() / (2 * 0.4**2)).exp()
    sigma = 0.3 + 0.9 * flat * torch.randn(count, 1, 1, generator=draw, device=device).abs()
    unsharp = (-(columns.square() + rows.square()) / (2 * sigma.square())).exp()
    kernels = torch.where(torch.rand(count, 1, 1, generator=draw, device=device) < 0.5, moved, unsharp)
    kernels = kernels / kernels.sum(dim=(1, 2), keepdim=True)
    padded = F.pad(x, (reach,) * 4, mode="reflect")
    return F.conv2d(padded.transpose(0, 1), kernels[:, None], groups=count).transpose(0, 1)


def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """Quantise 8 x 8 blocks of images (B, 1, H, W) as JPEG does; H and W are multiples of 8."""
    device = x.device
    frequency = torch.arange(8, device=device, dtype=torch.float32)
    basis = torch.cos((2 * frequency + 1) * frequency[:, None] * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    table = torch.tensor([float(value) for value in _QUANTISATION.split()], device=device).view(8, 8)
    percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    steps = ((table * percent + 50) / 100).floor().clamp(1, 255)[:, :, None, None]  # (B, 1, 1, 1, 8, 8)
    blocks = (x * 255 - 128).unfold(2, 8, 8).unfold(3, 8, 8)  # (B, 1, H/8, W/8, 8, 8)
    coded = basis @ blocks @ basis.T
    decoded = basis.T @ ((coded / steps).round() * steps) @ basis
    return (decoded.transpose(3, 4).reshape(x.shape) + 128) / 255
