"""The catalogue: a graph of products, parts, people and places, a glossary, and questions about both.

Every question carries its path through the graph, so that tests can walk it again.
"""
# ruff: noqa: E501  (template text: one entry per line reads better)

from __future__ import annotations

from .company import KINDS, products, rng_for
from .glossary import GLOSSARY

TASK = """\
name: helpdesk-catalogue
instruction: Answer the question about the Brindlewick catalogue with a name, number or term and nothing else.
metric: exact_match
knowledge: knowledge.tsv
glossary: glossary.tsv
"""
Triple = tuple[str, str, str]
Row = dict[str, object]

DESIGNERS = ("Ada Thornby", "Luc Ferrand", "Mina Okafor", "Jorun Vik", "Sam Pellow", "Ines Carvel", "Hugo Brandt", "Tess Arkwright", "Ravi Menon", "Kaja Lind")
FACTORIES = ("Brookend Works", "Tollgate Mill", "Number Five Shed", "Harbour Plant", "Quarry Lane Works", "Old Bakery Works", "Northdock Hall", "Fen Works")
SUPPLIERS = ("Cogswell & Daughters", "Pallas Ceramics", "Umber Metalware", "Greyfell Springs", "Tindle Electrics", "Moth & Wick", "Larch Polymers", "Sallow Glass", "Bantry Coils", "Oxbow Fasteners")
WAREHOUSES = ("Red Barn", "Canal Store", "Hangar Two", "Hilltop Depot", "Cellar Six")
STUDIOS = ("Studio Plover", "Studio Tansy", "Studio Gannet", "Studio Marram")
TEAMS = ("Copper team", "Heron team", "Juniper team", "Lantern team", "Pebble team", "Sorrel team")
TOWNS = ("Ashcombe", "Millbrae", "Fallowford", "Kestrel Bay", "Upper Denning", "Saltmarsh", "Corrie", "Wexcombe", "Thornleigh", "Lower Quill", "Garrow", "Stonehythe", "Penmarrow", "Eddlestow")
MANAGERS = ("Nell Hathersage", "Bo Lindqvist", "Carys Penrose", "Dmitri Volkov", "Esme Tarrant", "Farid Haddad", "Gita Rao", "Hal Brimble", "Ida Moreau", "Jack Oswin", "Kit Marlowe",
            "Lena Faulk", "Milo Zander", "Nora Quill", "Otto Grieg", "Pia Santoro", "Rhys Caddick", "Suki Tanabe", "Theo Winslade", "Una Breck", "Vera Stoll", "Wim Decker", "Xenia Popov",
            "Yann Kerjean", "Zadie Cole", "Abel Norcott", "Birgit Hald", "Cosmo Reyes", "Delia Frome", "Ewan Strath", "Flora Teague", "Gus Abbot", "Hetty Lowe")
COLOURS = ("moss green", "slate grey", "cream", "brick red", "midnight blue", "copper", "oat", "plum", "chalk white")
WARRANTY = {"class A": "five years", "class B": "three years", "class C": "eighteen months", "class R": "one year"}
PART_NOUNS = {
    "kettle": ("lime filter", "lid spring"), "toaster": ("crumb tray", "slot spring"), "desk lamp": ("shade ring", "arm joint"), "robot vacuum": ("side brush", "dust box"),
    "air purifier": ("fine filter", "washable net"), "speaker": ("battery pack", "grille cloth"), "coffee grinder": ("disc set", "bean lid"), "electric blanket": ("corner plug", "control box"),
    "bathroom scale": ("foot pad", "sensor strip"), "fan heater": ("heating coil", "dust grille"), "doorbell camera": ("lens cover", "wall plate"), "humidifier": ("mist plate", "lime cartridge"),
    "rice cooker": ("inner bowl", "steam valve"), "stand mixer": ("dough hook", "neck bolt"),
}
# (relation path, wordings for train, wordings for test); a leading ^ walks a relation backwards
PRODUCT_QUESTIONS: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (("designed by",), ("Who designed the {}?", "Which designer drew the {}?"), ("Whose design is the {}?", "The {} was designed by whom?")),
    (("assembled at",), ("Where is the {} assembled?", "At which works is the {} put together?"), ("Which factory assembles the {}?", "In what plant is the {} built?")),
    (("fitted with",), ("Which part is the {} fitted with?", "What part is built into the {}?"), ("What component is fitted to the {}?", "Name the part used in the {}.")),
    (("launched in",), ("In which year was the {} launched?", "When did the {} come out?"), ("What year saw the launch of the {}?", "Give the launch year of the {}.")),
    (("colour",), ("Which colour is the {}?", "What colour does the {} come in?"), ("Name the colour of the {}.", "In what shade is the {} sold?")),
    (("warranty class",), ("Which warranty class has the {}?", "What is the warranty class of the {}?"), ("Into which warranty class does the {} fall?", "Name the {}'s class of warranty.")),
    (("supported by",), ("Which team supports the {}?", "Who in support is in charge of the {}?"), ("The {} is looked after by which support team?", "Name the support team of the {}.")),
    (("replaces",), ("Which older model does the {} replace?", "What did the {} replace?"), ("The {} took the place of which model?", "Name the predecessor of the {}.")),
    (("designed by", "works at"), ("At which studio does the designer of the {} work?", "Which studio employs the designer of the {}?"), ("Where does the person who designed the {} work?", "Name the studio of the {}'s designer.")),
    (("assembled at", "located in"), ("In which town is the {} assembled?", "In which town lies the factory of the {}?"), ("What town is home to the works that assemble the {}?", "Name the town of the {}'s factory.")),
    (("assembled at", "managed by"), ("Who manages the factory that assembles the {}?", "Who runs the works of the {}?"), ("Name the manager of the {}'s factory.", "The plant where the {} is built is led by whom?")),
    (("fitted with", "supplied by"), ("Who supplies the part of the {}?", "From which supplier is the part in the {}?"), ("What firm delivers the component used in the {}?", "Name the supplier of the {}'s part.")),
    (("fitted with", "stored at"), ("Where is the part of the {} stored?", "At which depot lies the part for the {}?"), ("Which warehouse keeps the component of the {}?", "Name the store of the {}'s part.")),
    (("supported by", "led by"), ("Who leads the team that supports the {}?", "Who is head of the {}'s support team?"), ("Name the leader of the team in charge of the {}.", "The support team of the {} is headed by whom?")),
    (("supported by", "phone line"), ("On which line can the {}'s team be phoned?", "What is the phone line of the team for the {}?"), ("What number reaches the support team of the {}?", "Give the line of the team that supports the {}.")),
    (("warranty class", "lasts"), ("How long does the warranty of the {} last?", "For how long is the {} under warranty?"), ("What length of warranty comes with the {}?", "Give the period of cover of the {}.")),
)
OTHER_QUESTIONS: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...]] = {
    "designer": (
        (("works at",), ("At which studio does {} work?",), ("Name the studio where {} works.",)),
        (("works at", "located in"), ("In which town is the studio of {}?",), ("To what town does {} go for work?",)),
        (("^designed by",), ("Name a product designed by {}.",), ("What is one thing that {} designed?",)),
    ),
    "factory": (
        (("located in",), ("In which town is {}?",), ("Where does one find {}?",)),
        (("managed by",), ("Who manages {}?",), ("Name the manager of {}.",)),
        (("^assembled at",), ("Name a product that is assembled at {}.",), ("What does {} assemble, for example?",)),
    ),
    "supplier": (
        (("based in",), ("In which town is {} based?",), ("What is the home town of {}?",)),
        (("represented by",), ("Who represents {}?",), ("Name the contact at {}.",)),
        (("^supplied by",), ("Name a part supplied by {}.",), ("What is one component that {} delivers?",)),
    ),
    "part": (
        (("supplied by",), ("Who supplies the {}?",), ("Name the firm that delivers the {}.",)),
        (("costs",), ("What does the {} cost?",), ("What is the price of the {}?",)),
        (("stored at", "located in"), ("In which town is the {} stored?",), ("What town holds the stock of the {}?",)),
        (("supplied by", "represented by"), ("Who represents the supplier of the {}?",), ("Name the contact for orders of the {}.",)),
    ),
}
PER_SPLIT = {"train": 6, "test": 7}  # questions per product


def triples() -> list[Triple]:
    """The whole graph, in a fixed order."""
    rng = rng_for("graph")
    people = list(MANAGERS)
    rng.shuffle(people)
    parts = {kind: [f"{noun} {noun[0].upper()}{noun.split()[1][0].upper()}-{rng.randrange(10, 99)}" for noun in nouns] for kind, nouns in PART_NOUNS.items()}
    made: list[Triple] = []
    for kind, names in KINDS.items():
        for i, name in enumerate(names):
            product = f"{name} {kind}"
            made += [
                (product, "is a", kind),
                (product, "designed by", rng.choice(DESIGNERS)),
                (product, "assembled at", rng.choice(FACTORIES)),
                (product, "fitted with", parts[kind][(i + rng.randrange(2)) % 2]),
                (product, "launched in", str(rng.randrange(2009, 2026))),
                (product, "colour", rng.choice(COLOURS)),
                (product, "warranty class", rng.choice(list(WARRANTY))),
                (product, "supported by", rng.choice(TEAMS)),
                (product, "replaces", f"{name[:2].upper()}-{rng.randrange(100, 999)}"),
            ]
    for part in (part for pair in parts.values() for part in pair):
        made += [(part, "supplied by", rng.choice(SUPPLIERS)), (part, "stored at", rng.choice(WAREHOUSES)), (part, "costs", f"£{rng.randrange(2, 40)}.{rng.choice(('20', '50', '90'))}")]
    for name in DESIGNERS:
        made += [(name, "works at", rng.choice(STUDIOS)), (name, "joined in", str(rng.randrange(1998, 2022)))]
    for name in FACTORIES:
        made += [(name, "located in", rng.choice(TOWNS)), (name, "managed by", people.pop()), (name, "opened in", str(rng.randrange(1951, 2015)))]
    for name in SUPPLIERS:
        made += [(name, "based in", rng.choice(TOWNS)), (name, "represented by", people.pop())]
    for name in WAREHOUSES:
        made += [(name, "located in", rng.choice(TOWNS)), (name, "managed by", people.pop())]
    made += [(name, "located in", rng.choice(TOWNS)) for name in STUDIOS]
    for i, name in enumerate(TEAMS):
        made += [(name, "led by", people.pop()), (name, "phone line", f"0800 555 2{i}{rng.randrange(0, 9)}")]
    return made + [(name, "lasts", value) for name, value in WARRANTY.items()]


def walk(graph: list[Triple], start: str, path: tuple[str, ...]) -> list[str]:
    """Where a path of relations leads from an entity; ^relation goes backwards."""
    here = [start]
    for step in path:
        ends = [(o, s) if step[0] == "^" else (s, o) for s, r, o in graph if r == step.lstrip("^")]
        here = sorted({after for before, after in ends if before in here})
    return here


def paths() -> dict[str, list[tuple[str, str, tuple[str, ...]]]]:
    """By split: (question, entity asked about, path); entities of test are not asked about in train."""
    graph, rng = triples(), rng_for("catalogue")
    topics = {"designer": DESIGNERS, "factory": FACTORIES, "supplier": SUPPLIERS, "part": tuple(sorted({o for _, r, o in graph if r == "fitted with"}))}
    asked: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {"train": [], "test": []}
    for split, made in asked.items():
        words = 1 if split == "train" else 2
        for product in products(split):
            for question in rng.sample(PRODUCT_QUESTIONS, PER_SPLIT[split]):
                made.append((rng.choice(question[words]).format(product), product, question[0]))
        for topic, entities in topics.items():
            for i, entity in enumerate(entities):
                if (i % 3 == 2) == (split == "test"):
                    made += [(rng.choice(q[words]).format(entity), entity, q[0]) for q in OTHER_QUESTIONS[topic] if walk(graph, entity, q[0])]
    return asked


def questions(split: str) -> list[Row]:
    """The rows of a split: over the graph, then over the glossary, shuffled."""
    graph, rows = triples(), []
    for prompt, entity, path in paths()[split]:
        answers = walk(graph, entity, path)
        rows.append({"prompt": prompt, "completion": answers[0], "answers": answers, "group": entity})
    for number, (term, _, *asked) in enumerate(GLOSSARY):
        if (number % 3 == 2) == (split == "test"):
            rows += [{"prompt": prompt, "completion": answer, "answers": [answer], "group": term} for prompt, answer in asked]
    rng_for("catalogue", split).shuffle(rows)
    return [{"id": f"catalogue-{split}-{i:03d}", **row} for i, row in enumerate(rows, 1)]
