"""What the commands share: their errors, their options, tables and pictures."""

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

# PyTorch and OpenCV take seconds to import. Only the commands that need them import them, so that --help is instant.
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
    "quiet_stderr",
    "read_image",
    "resized",
    "tell_of_idle",
    "utf8_path",
    "whole_number",
    "write_picture",
]

# The parameters that say how two images are matched; the others are the node's alone.
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
    """A command cannot use what it was given. The user sees the text unchanged."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a --help away."""

    def __init__(self, **options: Any) -> None:
        # Abbreviations would change their meaning with every option added.
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; what is left over is refused by the command whose option it would be, not by `kpmatch`."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            # `--max_keypoints` is how a parameter is spelt everywhere but here.
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


def tell_of_idle(parameters: Parameters, command: str) -> None:
    """Tell the user of a command which of the parameters given play no part."""
    for text in parameters.idle():
        print(f"{command}: {text}", file=sys.stderr)


def add_parameter(group: Any, item: Declaration, default: Any) -> None:
    """An option of the parameter's name; `default` is what it is where the option is not given."""

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
    option = f"--{item.name.replace('_', '-')}"
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
    """Options of these parameters' names, in a group of their own. Those not given are not among the results."""
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
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected} numbers with commas between them")
        return values

    return parse


def image_size(text: str) -> tuple[int, int]:
    """Width and height in pixels."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 640x480")
    return int(found[1]), int(found[2])


def utf8_path(text: str) -> Path:
    """A file that a library writes which takes no other names."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # Python's for bytes that are not UTF-8
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8; choose another name")
    return Path(text)


def whole_number(least: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path | None], parameters: Parameters) -> None:
    """Refuse to write over what a command reads, before the work rather than after it.

    Args:
        outputs: the files to write, by the options that name them; an empty option where none does.
        inputs: the files and folders to read.
        parameters: they may name more of them, weights and masks.

    Raises:
        CommandError: an output is an input, or lies in one, by whatever name; or two outputs are one file.
    """
    sources = [*(path for path in inputs if path is not None), *files_read(parameters)]
    taken: dict[str, Path] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        named = f"{option} {path}".lstrip()
        source = overwritten(path, sources)
        if source is not None:
            raise CommandError(f"{named}: belongs to what is read ({source}); choose another name")
        for other, place in taken.items():
            if overwritten(path, [place]) is not None:
                raise CommandError(
                    f"{named}: cannot hold two things, and {other} is written there; choose another name"
                )
        taken[option] = path


def read_image(path: Path) -> NDArray[np.uint8]:
    """The picture in a file: uint8, grey (H, W) or RGB (H, W, 3), upright where its EXIF data says how it was held.

    Raises:
        CommandError: when there is no whole picture in it.
        OSError: when it cannot be read.
    """
    import cv2
    import numpy as np

    from kpmatch_ros.imaging.images import ImageError, check_header, whole_file

    data = path.read_bytes()
    whole = whole_file(data)  # OpenCV 4.6 fills in what a JPEG cut short lacks
    pixels = None
    if whole:
        try:
            check_header(whole, str(path))
        except ImageError as error:
            raise CommandError(str(error)) from error
        with quiet_stderr():
            try:
                pixels = cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_ANYCOLOR)
            except cv2.error:  # a size beyond OpenCV's limit, a codec that is switched off
                pixels = None
    if pixels is None:
        reason = "is empty" if not data else "is no image that OpenCV reads" if whole else "is cut short"
        raise CommandError(f"{path} {reason}{', or it is damaged or cut short' if whole else ''}")
    return np.asarray(pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


def resized(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture, grey or RGB, brought to a size (width, height) in pixels; itself where it has that already."""
    import cv2
    import numpy as np

    height, width = picture.shape[:2]
    if (width, height) == size:
        return picture
    way = cv2.INTER_AREA if size[0] * size[1] < width * height else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(picture, size, interpolation=way), np.uint8)


def can_write_picture(path: Path) -> bool:
    """Whether the ending of a file's name says a format that OpenCV writes."""
    import cv2

    try:
        return path.suffix.isascii() and bool(cv2.haveImageWriter(f"picture{path.suffix}"))
    except cv2.error:  # there is no ending
        return False


def write_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write RGB pixels (H, W, 3) in the format that the file's ending says.

    OpenCV only encodes: given a name that is not UTF-8, OpenCV 5 ends the process (a segmentation fault).

    Raises:
        OSError: when the file cannot be written.
        CommandError: when the picture has no such format, as it is too large for it.
    """
    import cv2

    with quiet_stderr():
        done, encoded = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not done:
        raise CommandError(f"{path}: OpenCV cannot make a {path.suffix} of this picture")
    path.write_bytes(encoded.tobytes())


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Silence the image libraries, which write to the process's stderr themselves."""
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
