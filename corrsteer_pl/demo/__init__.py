"""The embedded world: a tiny language model, its SAEs and two tasks, small enough to ship.

``python -m corrsteer_pl.demo.build`` makes all of it again from a seed.
"""

from pathlib import Path

ROOT = Path(__file__).parent / "assets"
MODEL = ROOT / "model"
SAES = ROOT / "saes"
DATA = ROOT / "data"
