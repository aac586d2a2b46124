"""Cut the training pictures of the photographs' tokenizer: tiles of 64 x 64 out of Debian's wallpapers.

    apt-get install plasma-workspace-wallpapers mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
    python docs/photos/tiles.py OUT

Only photographs are taken, those below, of each its largest file. Each tile comes from a photograph that was shrunk to
a random height of 300 to 1,100 pixels. Of tiles that are nearly of one colour, one in five is kept.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, TILES, SEED = 64, 32_000, 0
HEIGHTS = 300, 1100
FLAT = 6.0  # standard deviation in grey levels

PLASMA = [f"/usr/share/wallpapers/{name}/contents/images" for name in (
    "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite",
    "OneStandsOut", "Path", "summer_1am",
)]  # fmt: skip
MATE = [f"/usr/share/backgrounds/mate/nature/{name}.jpg" for name in (
    "Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm", "TwoWings",
    "Wood", "YellowFlower",
)]  # fmt: skip
LOMIRI = [f"/usr/share/backgrounds/{name}.jpg" for name in (
    "Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Picture_0B_by_freespace", "Picture_1A_by_freespace",
    "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich", "friends_by_Aitzol_Berasategi",
    "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi", "picosdeeuropa_by_Aitzol_Berasategi",
    "seeding_by_Clements_Engelhardt", "sunset_by_Aitzol_Berasategi", "Kleiber_by_Lukas_Baubkus",
)]  # fmt: skip


def largest(place: str) -> Path:
    """The picture at `place`, or the largest one in the folder."""
    path = Path(place)
    return max(path.iterdir(), key=lambda file: math.prod(Image.open(file).size)) if path.is_dir() else path


def tiles(photo: Image.Image, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    while len(found) < count:
        height = min(round(math.exp(rng.uniform(*map(math.log, HEIGHTS)))), photo.height)
        width = round(photo.width * height / photo.height)
        shrunk = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS))
        for _ in range(40):
            top, left = rng.integers(height - SIZE + 1), rng.integers(width - SIZE + 1)
            tile = shrunk[top : top + SIZE, left : left + SIZE]
            if tile.std() > FLAT or rng.random() < 0.2:
                found.append(tile)
    return found[:count]


def main() -> None:
    out = Path(sys.argv[1], "tiles")
    out.mkdir(parents=True)
    photos, rng = [largest(place) for place in PLASMA + MATE + LOMIRI], np.random.default_rng(SEED)
    for number, path in enumerate(photos):
        photo = Image.open(path).convert("RGB")
        photo.thumbnail((10_000, 2 * HEIGHTS[1]))
        for i, tile in enumerate(tiles(photo, TILES // len(photos), rng)):
            Image.fromarray(tile).save(out / f"{number:02}-{i:04}.png", compress_level=1)


if __name__ == "__main__":
    main()
