"""Brindlewick, a fictional maker of things for the home: what exists in its world, and which half of it is held out.

Whatever belongs to a kind in TEST_KINDS (and every name in the `test` half of a list) is met only in test rows.
"""

from __future__ import annotations

import random
import zlib

SEED = 20250714

KINDS: dict[str, tuple[str, str, str]] = {
    "kettle": ("Orla", "Pembry", "Tarn"),
    "toaster": ("Hobnail", "Crispin", "Doveridge"),
    "desk lamp": ("Wrenna", "Lumley", "Halden"),
    "robot vacuum": ("Scuttle", "Bramley", "Mossop"),
    "air purifier": ("Aldwin", "Fennick", "Brisa"),
    "speaker": ("Chorley", "Timbrel", "Oakum"),
    "coffee grinder": ("Quernby", "Marlock", "Burrley"),
    "electric blanket": ("Nestor", "Dozewell", "Eiderby"),
    "bathroom scale": ("Poise", "Tallis", "Evenlode"),
    "fan heater": ("Embery", "Calder", "Cindra"),
    "doorbell camera": ("Sentinel", "Porchway", "Knockley"),
    "humidifier": ("Dewpond", "Mistley", "Haarwick"),
    "rice cooker": ("Koshiba", "Grainger", "Lotrey"),
    "stand mixer": ("Whirlow", "Beaton", "Dollop"),
}
TEST_KINDS = ("fan heater", "doorbell camera", "humidifier", "rice cooker", "stand mixer")

PLACES = {
    "train": ("Ashcombe", "Millbrae", "Fallowford", "Kestrel Bay", "Upper Denning", "Saltmarsh", "Corrie", "Wexcombe"),
    "test": ("Thornleigh", "Lower Quill", "Garrow", "Stonehythe", "Penmarrow", "Eddlestow"),
}
PEOPLE = {
    "train": ("Maya", "Oskar", "Priya", "Tom", "Ingrid", "Callum", "Rosa", "Dele", "Hanna", "Marcus", "Yusuf", "Beth"),
    "test": ("Leila", "Piotr", "Gwen", "Anselm", "Noor", "Fergus", "Tilda", "Kofi"),
}
COURIERS = {"train": ("Swiftvan", "Parcelhorn", "Greyhound Freight"), "test": ("Redkite", "Tumbril Post")}
DAYS = {"train": ("Monday", "Wednesday", "Friday", "the 3rd", "the 12th"), "test": ("Tuesday", "Thursday", "the 21st")}
PLANS = {"train": ("Filter Club", "Brindle Plus"), "test": ("Fresh Box", "Pantry Plan")}
PROMOS = {"train": ("SPRING15", "HELLO10", "NEST20"), "test": ("AUTUMN25", "WARMUP5", "COSY30")}


def rng_for(*names: str) -> random.Random:
    """A generator of its own for every part, so that editing one part leaves the others as they were."""
    return random.Random(SEED + zlib.crc32("/".join(names).encode()))


def kinds(split: str) -> list[str]:
    """The kinds of product that rows of this split are about."""
    return [kind for kind in KINDS if (kind in TEST_KINDS) == (split == "test")]


def products(split: str) -> list[str]:
    """Products as people name them, "Orla kettle"."""
    return [f"{name} {kind}" for kind in kinds(split) for name in KINDS[kind]]


def slots(split: str, rng: random.Random) -> dict[str, str]:
    """One draw of everything a message can mention."""
    product, other, third = rng.sample(products(split), 3)
    return {
        "product": product,
        "other": other,
        "third": third,
        "kind": product.split(" ", 1)[1],
        "order": f"BW-{rng.randrange(10000, 99999)}",
        "city": rng.choice(PLACES[split]),
        "name": rng.choice(PEOPLE[split]),
        "courier": rng.choice(COURIERS[split]),
        "day": rng.choice(DAYS[split]),
        "plan": rng.choice(PLANS[split]),
        "promo": rng.choice(PROMOS[split]),
        "n": str(rng.randrange(4, 15)),
        "months": str(rng.randrange(3, 20)),
        "amount": f"£{rng.randrange(18, 160)}",
    }
