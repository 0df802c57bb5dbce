"""kpmatch weights: lists, fetches, inspects and converts weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kpmatch_ros import weights
from kpmatch_ros.cli.common import add_command, megabytes
from kpmatch_ros.shell import in_shell
from kpmatch_ros.tables import format_table

__all__ = ["add_weights"]


def add_weights(commands: Any) -> None:
    parser = commands.add_parser(
        "weights",
        help="list, fetch, inspect and convert weights",
        description="Registered weights of the networks, with their licence, size and origin.",
        epilog=f"example:\n  {in_shell('kpmatch weights list')}",
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_command(
        actions,
        "list",
        _weights_list,
        "list the registered weights",
        "List the registered weights.",
        "kpmatch weights list",
    )
    fetch = add_command(
        actions,
        "fetch",
        _weights_fetch,
        "fetch registered weights",
        "Fetch registered weights, unless they are on this machine, and check their hash. Their licence is shown "
        "first. Weights from the Hugging Face hub go into its own cache, through huggingface_hub; others go to "
        "$KPMATCH_WEIGHTS, or to kpmatch_ros in the user's cache folder.",
        "kpmatch weights fetch aliked-n16",
        "kpmatch weights fetch ETH-CVG/lightglue_disk",
    )
    fetch.add_argument("weights", metavar="NAME", help="a registered name (kpmatch weights list)")
    info = add_command(
        actions,
        "info",
        _weights_info,
        "show the origin, licence and content of weights",
        "Show the origin, licence and content of weights. Reading them never runs code from a file.",
        "kpmatch weights info superpoint-open",
        "kpmatch weights info superpoint_lightglue.pth",
    )
    info.add_argument("weights", metavar="NAME-or-FILE", help="a registered name, a Hugging Face folder or a file")
    convert = add_command(
        actions,
        "convert",
        _weights_convert,
        "write weights in another format",
        "Write weights in another format. IN is a registered name, a Hugging Face folder, a .safetensors file or a "
        ".pth of the networks' authors. OUT becomes a Hugging Face folder (config.json, model.safetensors), which "
        "transformers can load too if it has the network; if OUT ends in .safetensors, a file with one network. A "
        "matcher's folder holds its extractor too: if IN has none, name it with --extractor.",
        "kpmatch weights convert superpoint_v1.pth superpoint",
        "kpmatch weights convert superpoint_lightglue.pth lightglue --extractor superpoint_v1.pth",
    )
    convert.add_argument("source", metavar="IN", help="weights to read")
    convert.add_argument("target", metavar="OUT", type=Path, help="folder or .safetensors file to write")
    convert.add_argument("--extractor", metavar="IN", help="the extractor that the matcher was made for")


def _weights_list(options: argparse.Namespace) -> int:
    rows = [("name", "network", "licence", "commercial use", "size", "here", "from", "origin")]
    for item in weights.REGISTRY.values():
        rows.append(
            (
                item.name,
                " + ".join(item.networks),
                item.licence,
                "yes" if item.commercial else "NO",
                megabytes(item.size),
                weights.presence(item).word,
                type(item.source).__name__.lower(),
                item.origin,
            )
        )
    print(format_table(rows))
    print("\nhub: the Hugging Face hub's current revision; no hash is registered for it, the hub's own is checked")
    return 0


def _weights_fetch(options: argparse.Namespace) -> int:
    item = weights.find(options.weights)
    # Nothing shows progress here: pip and the hub's library show their own.
    path = weights.fetch(item.name, announce=lambda text: print(text, file=sys.stderr))
    print(f"{item.name} is at {path} ({item.terms})")
    return 0


def _weights_info(options: argparse.Namespace) -> int:
    from kpmatch_ros.models.checkpoint import tensor_file
    from kpmatch_ros.models.convert import describe

    source = options.weights
    item = weights.REGISTRY.get(source)
    here = item is None or weights.presence(item).word != "no"
    networks = describe(source) if here else []
    rows: list[tuple[str, ...]] = []
    known = [] if item is None else [item]
    if here:
        file = tensor_file(weights.resolve(source))
        sha256 = weights.file_hash(file)
        rows += [("file", str(file)), ("size", megabytes(file.stat().st_size)), ("SHA-256", sha256)]
        known = known or [one for one in weights.REGISTRY.values() if one.sha256 == sha256]
    elif item is not None:
        rows += [
            ("file", f"not on this machine: {in_shell(f'kpmatch weights fetch {item.name}')}"),
            ("size", megabytes(item.size)),
        ]
    for one in known:
        rows += [
            ("name", f"{one.name} ({one.model}{f' for {one.extractor}' if one.extractor else ''})"),
            ("licence", one.terms),
            ("origin", one.origin),
            ("from", str(one.source)),
            ("hash", _hash_note(one)),
        ]
    if not known:
        rows.append(("licence", "unknown: this file is not registered; ask its source"))
    print(format_table(rows))
    for network in networks:
        rows = [
            ("network", network.model),
            ("tensors", f"{len(network.tensors)} ({network.precision})"),
            ("parameters", f"{network.parameters:,}"),
            *((f"  {key}", str(value)) for key, value in network.config.items()),
        ]
        print(f"\n{format_table(rows)}")
    return 0


def _hash_note(item: weights.Weights) -> str:
    if item.sha256:
        return f"registered: {item.sha256}"
    if weights.presence(item).word == "yes" and weights.expected_hash(item):
        return "none registered: the hub's current revision; the file has the hub's own hash"
    return "none registered: the hub's current revision"


def _weights_convert(options: argparse.Namespace) -> int:
    from kpmatch_ros.models.convert import convert

    networks = convert(options.source, options.target, options.extractor)
    for network in networks:
        print(f"{options.target}: {network.model}, {network.parameters:,} parameters, {network.precision}")
    return 0
