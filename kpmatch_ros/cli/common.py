"""Functions that the commands share: errors, options, checks of files, and pictures."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kpmatch_ros.parameters import Declaration, ParameterError, Parameters, declaration, meant
from kpmatch_ros.shell import in_shell
from kpmatch_ros.source_files import files_read, overwritten

# PyTorch and OpenCV take seconds to import. Only commands that need them import them, so that --help answers at once.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "MATCHING_OPTIONS",
    "CommandError",
    "Parser",
    "add_command",
    "add_parameter",
    "add_parameters",
    "can_write_picture",
    "check_outputs",
    "comma_separated",
    "image_size",
    "megabytes",
    "option_of",
    "quiet_stderr",
    "read_image",
    "resized",
    "warn_of_idle",
    "utf8_path",
    "whole_number",
    "write_picture",
]

# The parameters that define how two images are matched. The others are for sequences of frames and for the node.
MATCHING_OPTIONS = (
    "profile",
    "extractor",
    "matcher",
    "backend",
    "providers",
    "device",
    "precision",
    "threads",
    "max_keypoints",
    "keypoint_threshold",
    "nms_radius",
    "border",
    "subpixel",
    "resize",
    "filter_threshold",
    "ratio_threshold",
    "depth_confidence",
    "width_confidence",
    "max_reprojection_error",
    "min_inliers",
)


class CommandError(Exception):
    """A command cannot use its input or options. The user sees the text unchanged."""


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line and refers to --help, instead of printing the usage."""

    def __init__(self, **options: Any) -> None:
        # No abbreviations: a new option could change what they mean.
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but let the command itself refuse unknown arguments, instead of `kpmatch`."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            # Everywhere else the parameter is spelt max_keypoints, so users may write `--max_keypoints`.
            hint = meant(unknown[0].partition("=")[0], self._option_string_actions) if unknown[0][0] == "-" else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({in_shell(f'{self.prog} --help')})\n")


def add_command(commands: Any, name: str, run: Any, summary: str, description: str, *examples: str) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 100),
        epilog="\n  ".join(["examples:" if len(examples) > 1 else "example:", *map(in_shell, examples)]),
    )
    parser.set_defaults(run=run, name=parser.prog)
    return parser


def warn_of_idle(parameters: Parameters, command: str) -> None:
    """Print on stderr which of the given parameters have no effect."""
    for text in parameters.idle():
        print(f"{command}: {text}", file=sys.stderr)


def option_of(name: str) -> str:
    """The option of a parameter: ``max_keypoints`` is ``--max-keypoints``."""
    return f"--{name.replace('_', '-')}"


def add_parameter(group: Any, item: Declaration, default: Any) -> None:
    """Add an option with the parameter's name. `default` is its value if the option is not given."""

    def value(text: str) -> Any:
        try:
            return item.check(item.type(text))
        except ParameterError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None

    shown = f"{item.default:g}" if item.type is float else str(item.default).lower() or "none"
    notes = ["" if item.choices else item.constraint, item.unit, f"default {shown}"]
    help_text = f"{item.description} ({', '.join(note for note in notes if note)})".replace("%", "%%")
    option = option_of(item.name)
    if item.type is bool:
        group.add_argument(
            option, dest=item.name, action=argparse.BooleanOptionalAction, default=default, help=help_text
        )
        return
    group.add_argument(
        option,
        dest=item.name,
        metavar={int: "N", float: "X"}.get(item.type, "|".join(item.choices) or item.name.upper()),
        type=value,
        default=default,
        help=help_text,
    )


def add_parameters(parser: Parser, title: str, names: Sequence[str]) -> None:
    """Add options with these parameters' names in a group of their own. Options not given have no attribute."""
    group = parser.add_argument_group(title, "the matcher node's parameters of the same names")
    for item in map(declaration, names):
        add_parameter(group, item, argparse.SUPPRESS)


def comma_separated(*counts: int) -> Any:
    def parse(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) not in counts:
            expected = " or ".join(str(count) for count in counts)
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected} numbers separated by commas")
        return values

    return parse


def image_size(text: str) -> tuple[int, int]:
    """Parse a size such as 640x480: width and height in pixels."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 640x480")
    return int(found[1]), int(found[2])


def utf8_path(text: str) -> Path:
    """Parse the path of a file that is written by a library that takes only UTF-8 names."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # Python's surrogates for bytes that are not UTF-8
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8; choose another name")
    return Path(text)


def whole_number(least: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path | None], parameters: Parameters) -> None:
    """Refuse to overwrite what a command reads. Call it before the work, not after it.

    Args:
        outputs: the files to write, by the options that name them; the option is empty if no option names the file.
        inputs: the files and folders to read.
        parameters: they may name more inputs: weights and masks.

    Raises:
        CommandError: an output is an input or inside one, also through links; or two outputs are the same file.
    """
    sources = [*(path for path in inputs if path is not None), *files_read(parameters)]
    taken: dict[str, Path] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        named = f"{option} {path}".lstrip()
        source = overwritten(path, sources)
        if source is not None:
            raise CommandError(f"{named}: belongs to the input {source}; choose another name")
        for other, place in taken.items():
            if overwritten(path, [place]) is not None:
                raise CommandError(f"{named}: is also written by {other}; choose another name")
        taken[option] = path


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read a picture file: uint8, grey (H, W) or RGB (H, W, 3), turned upright according to its EXIF data.

    Raises:
        CommandError: the file holds no complete picture.
        OSError: the file cannot be read.
    """
    import cv2
    import numpy as np

    from kpmatch_ros.imaging.images import ImageError, check_header, whole_file

    data = path.read_bytes()
    whole = whole_file(data)  # OpenCV 4.6 would accept a truncated JPEG and fill in what is missing
    pixels = None
    if whole:
        try:
            check_header(whole, str(path))
        except ImageError as error:
            raise CommandError(str(error)) from error
        with quiet_stderr():
            try:
                pixels = cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_ANYCOLOR)
            except cv2.error:  # for example a size beyond OpenCV's limit, or a codec that is switched off
                pixels = None
    if pixels is None:
        reason = "is empty" if not data else "is not an image that OpenCV can read" if whole else "is cut short"
        raise CommandError(f"{path} {reason}{', or it is damaged or cut short' if whole else ''}")
    return np.asarray(pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


def resized(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture, grey or RGB, resized to (width, height) in pixels; the picture itself if it has that size."""
    import cv2
    import numpy as np

    height, width = picture.shape[:2]
    if (width, height) == size:
        return picture
    way = cv2.INTER_AREA if size[0] * size[1] < width * height else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(picture, size, interpolation=way), np.uint8)


def can_write_picture(path: Path) -> bool:
    """Whether the extension of a file's name is a format that OpenCV writes."""
    import cv2

    try:
        return path.suffix.isascii() and bool(cv2.haveImageWriter(f"picture{path.suffix}"))
    except cv2.error:  # there is no extension
        return False


def write_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write RGB pixels (H, W, 3) in the format of the file's extension.

    OpenCV only encodes the picture; it does not write the file, because OpenCV 5 crashes (segmentation fault) on a file
    name that is not UTF-8.

    Raises:
        OSError: the file cannot be written.
        CommandError: the format cannot hold the picture, for example because the picture is too large.
    """
    import cv2

    with quiet_stderr():
        done, encoded = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not done:
        raise CommandError(f"{path}: OpenCV cannot write this picture as {path.suffix}")
    path.write_bytes(encoded.tobytes())


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discard what image libraries write directly to the stderr of the process."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
