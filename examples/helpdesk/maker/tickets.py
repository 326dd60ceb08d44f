"""Tickets: 12 intents, each with surface families for train and others, in other words, for test.

A ticket is a core (what the customer wants, one family) with, in any mix, an opening, an aside about some other
matter that is already settled, a remark and a closing. The asides make single words a poor guide to the intent.
"""
# ruff: noqa: E501  (template text: one entry per line reads better)

from __future__ import annotations

import random
import re

from .company import rng_for, slots
from .cores import CORES
from .text import fill, sentence, spin, words

TASK = """\
name: helpdesk
instruction: Name what the customer wants help with now. Matters that are already settled do not count.
metric: accuracy
labels: [{labels}]
earlier: [../last-year]
"""

OPENINGS = {
    "train": (
        "Hi,", "Hello there,", "Good morning,", "Hi team,", "Dear Brindlewick,", "Hey,", "Hello, <name> here.",
        "Hi, it's <name> from <city>.", "{Me again, sorry.|Sorry to bother you.}", "Order <order>.", "Right, so.",
        "Good evening, I hope you can help.", "Could somebody look into this?", "About order <order>:", "OK, deep breath.",
    ),
    "test": (
        "Dear sir or madam,", "Afternoon all,", "To whom it may concern,", "Hiya,", "<name> writing from <city>.",
        "Quick one for you.", "Reference <order>.", "Greetings,", "Not sure this is the right inbox.", "Hello help desk,",
    ),
}
CLOSINGS = {
    "train": (
        "Thanks, <name>", "Many thanks!", "Please advise.", "Best wishes, <name>", "Hope to hear from you soon.",
        "{Honestly a bit fed up now.|I am losing patience.}", "Cheers", "Thank you for your help.", "Regards, <name>, <city>",
        "This is the second time I write.", "Please answer by email.", "Have a nice day.",
    ),
    "test": (
        "Yours, <name>", "Ta very much.", "Grateful for a swift answer.", "Kind regards, <name> (<city>)",
        "Not impressed so far.", "Ring me if that is easier.", "Looking forward to your reply.", "With thanks, <name>",
    ),
}
REMARKS = {
    "train": (
        "{I have been a customer for years.|I normally love your things.}", "The <product> was a present for my {sister|dad|boss}.",
        "I tried the chat but it {closed|froze} on me.", "My neighbour in <city> recommended you.", "I bought it with my own savings.",
        "Your colleague <name> was {very kind|no help} on the phone.", "I live {alone|with two toddlers} in <city>.",
        "I looked through the help pages and found nothing.", "The <third> I also own is brilliant, by the way.",
    ),
    "test": (
        "I have recommended you to half of <city>.", "It was meant for my {mother-in-law|flatmate}.", "The phone queue was endless.",
        "Searching your website got me nowhere.", "<name> at the counter told me to email.", "We are a small office in <city>.",
        "Our <third> still works like a dream, incidentally.",
    ),
}
# What is NOT asked: settled, denied or somebody else's business.
ASIDES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "refund": (
            "The refund for the <third> came through last week, thank you.",
            "I am keeping the <third>, I {don't want|am not asking for} my money back for it.",
            "You have already paid me back for the <third>, so that is closed.",
        ),
        "delivery delay": (
            "The <third> was late too, but it {arrived|turned up} in the end.",
            "The delivery of the <third> was delayed, it is here now and that is fine.",
            "<courier> finally dropped off the late parcel on <day>, so no worries there.",
        ),
        "wrong item": (
            "You once sent me the wrong <third>, but that was swapped.",
            "The <third> I got before was the right item, I checked.",
            "The mix-up with the <third> has been put right.",
        ),
        "damaged item": (
            "The broken <third> was replaced already, no complaints.",
            "Nothing was broken in my last parcel, to be clear.",
            "The box of the <third> had a dent, but it was fine inside.",
        ),
        "account access": (
            "I {have|had} reset my password earlier and can log in again.",
            "My login works fine now.",
            "{Getting into my account was a pain last month, but that is solved.|My account is unlocked again, thanks.}",
        ),
        "billing error": (
            "The double charge from {spring|last month} was corrected.",
            "The invoice is right, I am not disputing the bill.",
            "You once took <amount> too much but returned it, fine.",
        ),
        "order cancellation": (
            "My wife cancelled her own order already, ignore that one.",
            "I {do not want to cancel|am not cancelling} my order for the <third>.",
            "The order I cancelled last week is closed, this is a different one.",
        ),
        "address change": (
            "I changed my address to <city> in the app already, that worked.",
            "The address on the other parcel is correct.",
            "We moved to <city> in spring and you have our new address.",
        ),
        "subscription change": (
            "My <plan> subscription can stay just as it is.",
            "I paused the <plan> box myself, that is done.",
            "The <plan> subscription renews in May and I am happy with it.",
        ),
        "warranty repair": (
            "The repair of our old <third> went well, by the way.",
            "My <third> was mended under warranty last year.",
            "My old <third> works perfectly, it needs no repair.",
        ),
        "setup help": (
            "I worked out how to pair the <third> by myself.",
            "Setting up the app went fine.",
            "The manual answered my Wi-Fi question.",
        ),
        "discount code": (
            "I used <promo> for my last order and it worked.",
            "I don't need a voucher or discount.",
            "Thanks for the <promo> code, my friend used it.",
        ),
    },
    "test": {
        "refund": ("Reimbursement for the <third> has long since landed.", "No need to reimburse the <third>, I am keeping it."),
        "delivery delay": ("The overdue <third> showed up at last, forget about it.", "Shipping the <third> took ages, though it is here."),
        "wrong item": ("Last year's mistaken <third> was exchanged without fuss.", "The <third> you posted matched what I bought."),
        "damaged item": ("The smashed <third> has been dealt with.", "The <third> came out of its packaging in one piece."),
        "account access": ("Signing in is no trouble any more.", "I sorted the forgotten password on my own."),
        "billing error": ("The overpayment in winter has been settled.", "Your invoice adds up, I have no quarrel with it."),
        "order cancellation": ("The purchase I called off before is history.", "My other order stands, keep that going."),
        "address change": ("You already hold our new <city> street and postcode.", "The label on the <third> shows the proper house number."),
        "subscription change": ("Leave my <plan> membership alone, it suits me.", "I skipped a month of <plan> online, done."),
        "warranty repair": ("Your workshop fixed my <third> nicely in June.", "Our <third> runs without a hitch."),
        "setup help": ("Connecting the <third> was child's play.", "Installing the <third> went smoothly."),
        "discount code": ("The <promo> coupon went through all right before.", "I can do without any promotion."),
    },
}
# What IS asked, said once more; fits every family of its intent.
REQUESTS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "refund": ("{So please sort out|Kindly see to} the refund.", "It is my money I am after.", "I write about the refund, nothing else.",
                   "All I want is to be paid back.", "Could you check the refund for me?"),
        "delivery delay": ("It is {simply late|far too late}.", "Where is it and when will it arrive?", "This delay is {a nuisance|annoying}.",
                           "I just want it delivered at last.", "Could you check with the courier where it is?"),
        "wrong item": ("{It is not what I ordered.|That is the wrong item.}", "Please exchange it for the right one.", "You sent the wrong thing, I'm afraid.",
                       "I would like what I ordered instead."),
        "damaged item": ("It arrived damaged, in short.", "{It was broken on arrival.|It was damaged on the way.}", "I can send photos of the damage.",
                         "I need a replacement for the broken one."),
        "account access": ("I {just|only} want to get into my account.", "Please help me log in.", "I am locked out, in other words.",
                           "How do I get access to my account again?", "Without a working password I am stuck."),
        "billing error": ("{Please correct the bill.|Please check my invoice.}", "I think I was charged wrongly.", "The billing is wrong, that is my point.",
                          "I would like the charge explained.", "I won't pay what I don't owe."),
        "order cancellation": ("{So: cancel it, please.|Please confirm the cancellation.}", "I want the order stopped before it ships.",
                               "Just cancel, I don't want it any more.", "Tell me when the order is cancelled."),
        "address change": ("{So the delivery address needs to change.|Please change the address.}", "Where it is sent is what matters to me.",
                           "Please make sure it goes to the right address.", "Can you update the delivery details?"),
        "subscription change": ("{It is only about my subscription.|Please change my subscription.}", "Where in the app do I change the plan?",
                                "Please adjust my plan from next month.", "Tell me if the subscription change went through."),
        "warranty repair": ("{Can it be repaired?|I would like it repaired.}", "I hope the warranty covers it.", "Where do I send it for repair?",
                            "It used to work and now it is faulty."),
        "setup help": ("{How does it work?|I am new to this.}", "I only need to know how to set it up.", "Which steps do I follow to get it going?",
                       "It is not faulty, I just don't know how.", "Can you explain the settings to me?"),
        "discount code": ("{I would like the discount.|I want to pay the lower price.}", "Please check the code.", "It is about the voucher, nothing else.",
                          "How do I get the discount?"),
    },
    "test": {
        "refund": ("The refund is what this is about.", "When do I see my money?", "Please have the refund paid."),
        "delivery delay": ("How late is it going to be?", "I'd like to know when it arrives.", "I need the delivery sped up."),
        "wrong item": ("So it is the wrong item.", "Send me the right one, please.", "That's not the thing I ordered."),
        "damaged item": ("So it got damaged before I had it.", "It's broken, and I only just got it.", "I want a replacement for this damaged one."),
        "account access": ("All I need is to log in.", "My account is out of reach.", "Please get me back into the account."),
        "billing error": ("Someone should check that charge.", "The bill needs correcting.", "I refuse to pay a wrong invoice."),
        "order cancellation": ("I'd be glad of a note that it is cancelled.", "Cancel it before shipping, please.", "The order must be stopped."),
        "address change": ("It must be sent to the other address.", "The address has to be updated.", "Can the delivery address be changed?"),
        "subscription change": ("That's all I want changed in my subscription.", "Can my plan be changed like that?", "Please alter the subscription."),
        "warranty repair": ("A repair would be welcome.", "Is there any warranty on that?", "I want it repaired, being faulty."),
        "setup help": ("I don't know how to set it up.", "Some steps to follow would help.", "Which settings do I need?"),
        "discount code": ("I'd like that discount.", "Please look at the voucher code.", "How do I come by the lower price?"),
    },
}
LABELS = tuple(CORES)
AFTER_COMMA = re.compile(r"(?<=, )(A|An|The|My|We|You|Please|How|When|Where|What|Which|It|Is|Can|Our|Your) ")
REQUESTED, ASIDE = 0.7, 0.6  # shares of tickets that say the request once more, and that have an aside
ROWS_PER_FAMILY = {"train": 9, "test": 7}


def typo(text: str, rng: random.Random) -> str:
    """Swaps or drops a letter in one or two longer words, as hurried people do."""
    parts = text.split(" ")
    for _ in range(rng.choice((1, 1, 2))):
        places = [i for i, part in enumerate(parts) if len(part) > 4 and part.isalpha() and part.islower()]
        if places:
            i = rng.choice(places)
            j = rng.randrange(1, len(parts[i]) - 2)
            part = parts[i]
            parts[i] = part[:j] + (part[j + 1] + part[j] + part[j + 2 :] if rng.random() < 0.5 else part[j + 1 :])
    return " ".join(parts)


def message(core: str, label: str, split: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    """One ticket around a core, and the entities it mentions."""
    draw = slots(split, rng)
    middle = [core]
    if rng.random() < REQUESTED:
        middle.append(rng.choice(REQUESTS[split][label]))
    if rng.random() < ASIDE:
        aside = rng.choice(ASIDES[split][rng.choice([other for other in LABELS if other != label])])
        middle.insert(rng.choice((0, 0, len(middle))), aside)
    if rng.random() < 0.25:
        middle.insert(rng.randrange(len(middle) + 1), rng.choice(REMARKS[split]))
    opening = rng.choice(OPENINGS[split]) if rng.random() < 0.55 else ""
    closing = rng.choice(CLOSINGS[split]) if rng.random() < 0.45 else ""
    text = sentence(fill(spin(" ".join([opening, *middle, closing]), rng), draw))
    text = AFTER_COMMA.sub(lambda match: match[0].lower(), text, count=1) if opening.endswith(",") else text
    style = rng.random()
    if style < 0.08:
        text = text.lower()
    elif style < 0.16:
        text = typo(text, rng)
    elif style < 0.2:
        text = text.rstrip(".") + "!!"
    return text, draw


def rows(split: str) -> list[dict[str, object]]:
    """All tickets of a split, shuffled."""
    rng, seen, made = rng_for("tickets", split), set[str](), []
    for label, families in CORES.items():
        for number, core in enumerate(families[split], 1):
            kept = 0
            while kept < ROWS_PER_FAMILY[split]:
                text, _ = message(core, label, split, rng)
                if 8 <= words(text) <= 45 and text not in seen:
                    seen.add(text)
                    kept += 1
                    made.append((text, label, f"{split}/{label.replace(' ', '-')}/{number:02d}"))
    rng.shuffle(made)
    return [
        {"id": f"ticket-{split}-{i:04d}", "prompt": text, "completion": label, "group": group}
        for i, (text, label, group) in enumerate(made, 1)
    ]
