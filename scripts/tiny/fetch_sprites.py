"""Fetch the sprites of the tiny world: emoji of npm's icon packages, drawn as transparent PNGs.

    python scripts/tiny/fetch_sprites.py --outdir models/tiny/sprites

Needs `npm` and network once, and `pip install resvg-py`. `ldm/tiny/world_sprites.yaml` says which
icons stand for which class. A sprite is `{class}/{family}-{icon}.png`, trimmed to what it shows.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from PIL import Image

from ldm.errors import UserError
from ldm.tiny.sprites import read_sprite_table
from ldm.tiny.views import camera

FAMILIES = {
    "noto": "@iconify-json/noto",
    "noto_v1": "@iconify-json/noto-v1",
    "twemoji": "@iconify-json/twemoji",
    "fluent": "@iconify-json/fluent-emoji",
    "fluent_flat": "@iconify-json/fluent-emoji-flat",
    "emojione": "@iconify-json/emojione",
    "fxemoji": "@iconify-json/fxemoji",
    "fluent_3d": "@lobehub/fluent-emoji-3d",
}
# The files of this family are named by code points, `1f415.webp`. Noto's list has their names.
NAMED_BY_CODE_POINTS = "fluent_3d"
AUTHORS = {"@lobehub/fluent-emoji-3d": "Microsoft Corporation, packaged by LobeHub"}

CREDITS = """# Where the sprites of the tiny world come from

`scripts/tiny/fetch_sprites.py` fetches them from npm. They are not shipped; the models in this
folder were trained on
pictures of them: scaled, turned, recoloured and lit, on scenes of our own."""

Draw = Callable[[], Image.Image]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--outdir", type=Path, default=Path("models/tiny/sprites"), help="where the sprites go"
    )
    parser.add_argument("--size", type=int, default=128, help="longer side of a sprite in pixels")
    parser.add_argument(
        "--packages", type=Path, help="keep the fetched packages here and use those already there"
    )
    parser.add_argument(
        "--credits", type=Path, help="write the table of packages and licences to this file"
    )
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folders = {
                family: fetch(name, args.packages or Path(temporary))
                for family, name in FAMILIES.items()
            }
            icons = {family: open_family(family, folders) for family in FAMILIES}
            counts = write_sprites(icons, args.outdir, args.size)
            if args.credits:
                args.credits.write_text(credits(folders))
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(f"{args.outdir}: {sum(counts.values())} sprites of {len(counts)} classes")


def fetch(package: str, folder: Path) -> Path:
    """Return the folder of an unpacked npm package. Fetch it into `folder` unless it is there."""
    target = folder / package.removeprefix("@").replace("/", "-")
    if target.exists():
        return target
    if shutil.which("npm") is None:
        raise UserError(
            "npm: not found; install Node.js, "
            "or give --packages FOLDER with the packages from elsewhere"
        )
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--loglevel=error", "--fetch-retries=1", "--pack-destination", str(folder)]
    done = subprocess.run(["npm", "pack", package, *options], capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = said[0] if said else f"status {done.returncode}"
        raise UserError(f"npm pack {package}: failed ({reason}); it needs network access")

    # npm's last word is the name of the archive.
    archive = folder / done.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    archive.unlink()
    return target


def open_family(family: str, folders: dict[str, Path]) -> dict[str, Draw]:
    """Return icon name -> a function that draws it."""
    package = folders[family] / "package"
    if family == NAMED_BY_CODE_POINTS:
        characters = json.loads((folders["noto"] / "package" / "chars.json").read_text())
        names = {plain(code_points): name for code_points, name in characters.items()}
        files = {names.get(plain(path.stem)): path for path in package.glob("assets/*.webp")}
        return {name: lambda path=path: Image.open(path) for name, path in files.items() if name}
    collection = json.loads((package / "icons.json").read_text())
    return {
        name: lambda icon=icon: rasterise(icon, collection)
        for name, icon in collection["icons"].items()
    }


def plain(code_points: str) -> str:
    """Return code points without the one that only asks for a coloured picture."""
    return "-".join(part for part in code_points.split("-") if part != "fe0f")


def rasterise(icon: dict, collection: dict, size: int = 320) -> Image.Image:
    """Draw an icon of a collection, `size` pixels wide."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise UserError("drawing the sprites needs a package: pip install resvg-py") from None
    default = collection.get("width", 16), collection.get("height", 16)
    width, height = icon.get("width", default[0]), icon.get("height", default[1])
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {spaces} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size * height // width)
    return Image.open(io.BytesIO(bytes(drawn)))


def trimmed(image: Image.Image, size: int) -> Image.Image:
    """Return what is not transparent of an image, its longer side `size` pixels."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 12)).getbbox()
    image = image.crop(box)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def write_sprites(families: dict[str, dict[str, Draw]], outdir: Path, size: int) -> dict[str, int]:
    """Write `{class}/{family}-{icon}.png`. Return how many sprites each class has."""
    counts = {}
    for class_word, entry in read_sprite_table().items():
        folder = outdir / class_word
        folder.mkdir(parents=True, exist_ok=True)
        # Remove the sprites of an older table. Toys stay: they were rendered here, not fetched.
        for path in folder.glob("*.png"):
            if camera(path) is None:
                path.unlink()
        for name, draw in wanted(entry, families):
            trimmed(draw(), size).save(folder / f"{name}.png")
        counts[class_word] = sum(camera(path) is None for path in folder.glob("*.png"))
    return counts


def wanted(entry: dict, families: dict[str, dict[str, Draw]]) -> Iterator[tuple[str, Draw]]:
    """Yield the name of each sprite that the table wants of a class, and what draws it."""
    for icon in entry["icons"]:
        for family, icons in families.items():
            name = f"{family}-{icon}"
            left_out = any(fnmatchcase(name, pattern) for pattern in entry.get("without", ()))
            if icon in icons and not left_out:
                yield name, icons[icon]


def credits(folders: dict[str, Path]) -> str:
    """Return the Markdown table of what was fetched."""
    rows = [f"{CREDITS}\n", "| package | version | licence | author |", "|---|---|---|---|"]
    for family, package in FAMILIES.items():
        meta = json.loads((folders[family] / "package" / "package.json").read_text())
        info_file = folders[family] / "package" / "info.json"
        info = json.loads(info_file.read_text()) if info_file.exists() else {}
        author = info.get("author", {})
        who = AUTHORS.get(package) or f"[{author['name']}]({author['url']})"
        licence = info.get("license", {}).get("title", meta["license"])
        rows.append(f"| `{package}` | {meta['version']} | {licence} | {who} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
