"""Last year's task: how urgent is a message? It shares its topics with this year's tickets, but asks something else."""
# ruff: noqa: E501  (template text: one entry per line reads better)

from __future__ import annotations

from .company import rng_for, slots
from .text import fill, sentence, spin, words
from .tickets import CLOSINGS, OPENINGS

TASK = """\
name: helpdesk-last-year
instruction: Say how urgent the customer's message is.
metric: accuracy
labels: [danger, deadline, no rush, no reply needed]
"""
ROWS_PER_FAMILY = {"train": 13, "test": 13}

# The topic says nothing about urgency.
TOPICS = {
    "train": (
        "I {wrote|called} about {order <order>|the <product>} {on <day>|before}.", "It is about my <product>.", "I bought {a <product>|a <product> from you} in <city>.", "You know me from the matter of the <other>.",
        "My question concerns the {invoice|delivery|warranty} of the <product>.", "{My parents|The neighbours|We} {own|have} a <product>.", "The <product> stands in {the kitchen|our hall|my office}.", "I {ordered|returned} a <product> not long ago.",
        "There was {an email|a letter} from you about my {account|subscription|refund}.", "This is about the {discount code|address|bill} for the <product>.",
    ),
    "test": (
        "We {got in touch|spoke} about the <product> {on <day>|previously}.", "Regarding the <product>:", "A <product> was supplied to me in <city>.", "It has to do with {a purchase|my membership|the repayment} of mine.",
        "{Our household|My flatmate} {purchased|uses} a <product>.", "The subject is {the guarantee|a coupon|the receipt} for my <product>.",
    ),
}
CUES: dict[str, dict[str, tuple[str, ...]]] = {
    "danger": {
        "train": (
            "I can see {fumes|a glow} rising {from inside|from the vents}.", "It {gave me|gives} an electric shock when {I touched it|touched}.", "There are sparks {at the plug|behind it} {when I turn it on|every time}.", "{It's crackling and flashing at the outlet|The outlet flashes blue}, {the whole flat stinks|we've fled the room}.",
            "Water {runs|drips} {into the socket|onto the live cable}.", "{It caught fire|There was a flame} and I {put it out|had to throw a towel over it}.", "The casing is {melting|charring} {as I write|before my eyes}.", "My {child|little boy} {cut his hand|got burned} on {it|the broken edge}.",
            "It became so hot that {the table melted|the shelf is scorched}.", "The {cell|accumulator} has {bulged|ballooned} and leaks {acid|something that stings}.", "The {fuse|main fuse} blows with a bang {and the socket is black|and I smell smoke}.", "The cable is {bare|open} down to the {copper|wire} and it is {still live|plugged in where I can't reach}.",
        ),
        "test": (
            "{Smoke|Black smoke} {comes|is coming} out of {the back|the base}.", "{A jolt went through my arm|My hand tingled badly} as I {unplugged it|held the switch}.", "It {smells of burning|smells of hot plastic} and {the cable is hot|the wall is turning brown}.", "My {daughter|cat} got {scalded|singed} by it {a moment ago|just now}.",
            "The battery is {swelling|swollen} and {hisses|very hot}.", "The glass {burst|exploded} {while it was on|in use} and flew {past my face|across the room}.",
        ),
    },
    "deadline": {
        "train": (
            "{Our ferry departs|The removal van arrives} on Wednesday, {everything hinges on your word till then|so kindly respond ahead of it}.", "The party is {tomorrow|the day after tomorrow}, {it must be settled by then|so I need to know today}.", "My {offer|return period} ends {tonight|tomorrow}, so {please answer today|it has to be today}.", "It's the {anniversary|christening} on Sunday, {time is running out|and I'm empty-handed}.",
            "I need {a yes or no|an answer} {by noon|before five o'clock}.", "We move out {this weekend|on Sunday}, {after that it is too late|so it has to be done before}.", "The {auditor|landlord} expects the papers no later than {Friday|this afternoon}.", "My {boss|accountant} wants it {by the end of the day|by Wednesday}.",
            "The {wedding|birthday} is {in three days|this Saturday} and {nothing is settled|I have nothing else}.", "You have until {tomorrow noon|the close of business}, {then my voucher is void|then the offer is void}.", "There are only {two days|48 hours} left to {decide|sign}, {so please be quick|so I am in a hurry}.", "{If I hear nothing by|I must hear from you by} {tomorrow|Thursday}{, I lose my deposit|, or the booking lapses}.",
        ),
        "test": (
            "I {fly|leave} on {Friday|Saturday} and need {an answer|this solved} before that.", "{The examiner visits|The tenants arrive} {within the week|the day after next}; it {can't wait past that|has to be sorted ahead of it}.", "The {builder|electrician} comes {tomorrow morning|on Thursday} and has to know {by then|what to do}.", "My {visa|lease} expires {at midnight|tomorrow}, {hence the haste|so do respond straight away}.",
            "Our {shop|café} opens {on Monday|in two days} and {cannot open without it|depends on this}.", "Please answer within {24 hours|the day}, {my bank will close the case|the court date is on Tuesday}.",
        ),
    },
    "no rush": {
        "train": (
            "{Don't break a sweat over this|No pressure whatsoever}: {is there a longer cord|what's the shade called}?", "{Whenever you have time|When it is quiet}, {could you tell me the part number|please send me the guide}?", "I only {wonder|ask} out of interest, {take your time|next month is fine}.", "{Some time this season|In due course} would be soon enough, {we hardly use it|it sits in the attic}.",
            "{A small question|Just a small thing} for a quiet day: {does it come in blue|how old is the model}?", "Please put it at the bottom of your pile, {others need you more|it is not important}.", "The {wobble|hum} is so slight that {it could go on for years|nobody else notices}, {mention it if you're ever nearby|glance at it one day}.", "We {manage|get by} well without it for now, {so no stress|so do it when it suits you}.",
            "It is a {scratch|squeak} that {hardly bothers me|I can live with}, {look at it some day|maybe you know a trick}.", "I shan't need {this|it} before {next winter|the autumn after next}, {so relax|so leave it for later}.", "Next time somebody is {at the archive|free}, {could they look up the year|I would like to know who designed it}.", "You need not answer {this week|soon}, {I am away anyway|I am in no hurry}.",
        ),
        "test": (
            "There is no hurry, {answer when you can|any time will do}.", "I'm merely {curious|pondering} {whether a larger size exists|what it's made of}, respond at leisure.", "It can wait {until after the holidays|until spring}, {I don't need it now|we won't use it before}.", "Low priority from my side, {see to the weightier cases first|deal with it on a slow afternoon}.",
            "I am {planning|thinking} for next year, so {there is plenty of time|an answer in a few weeks is early enough}.", "{Not urgent at all|Nothing urgent}: {which filter fits|can I get a second cable}?",
        ),
    },
    "no reply needed": {
        "train": (
            "{Consider it settled|It's sorted}, {please archive this|no further word required}.", "I just want to say {thank you|well done} to {<name>|your team}, {that was great service|you made my day}.", "For your information only: {it works again|the parcel came}.", "Merely to let you know {that it turned up in the end|it's up and running}, {cheerio|nothing to do}.",
            "This is an automatic answer: I am {on holiday|out of office} until <day>.", "{Received|Got it}, thanks, {everything is fine|all good}.", "Out-of-office note: I'm {travelling|on leave} and will {read mail|return} {on <day>|in a fortnight}.", "You need not write back, {I only wanted you to know that it is fine|it has sorted itself out}.",
            "Your answer {helped|was right}, {the case is closed for me|now it runs}. {Thanks a lot.|Best wishes to all.}", "{Much obliged for the parcel|Acknowledged with gratitude}, {we couldn't be happier|it's just what we wished for}.", "{As asked, here is|Attached is} the {copy|photo} for your files, {nothing more to do|no need to confirm}.", "My {son|neighbour} fixed it, {so forget my question|the matter is done}.",
        ),
        "test": (
            "All is solved now, {thank you|thanks}, {you can close this|no answer needed}.", "A big {hug|bravo} to {<name>|whoever helped me}, {splendid work|you were a star}.", "Please ignore my last {message|email}, {I found it|it was my mistake}.", "Disregard what I sent {earlier|an hour ago}, {I'd misread the leaflet|the switch was simply off}.",
            "I forgot to say how {happy|pleased} we are, {keep it up|that is all}.", "Five stars from me, {nothing else to add|I told all my friends}.",
        ),
    },
}
LABELS = tuple(CUES)


def rows(split: str) -> list[dict[str, object]]:
    """All messages of a split, shuffled."""
    rng, seen, made = rng_for("last-year", split), set[str](), []
    for label, families in CUES.items():
        for number, cue in enumerate(families[split], 1):
            kept = 0
            while kept < ROWS_PER_FAMILY[split]:
                parts = [rng.choice(OPENINGS[split]) if rng.random() < 0.4 else "", rng.choice(TOPICS[split]), cue]
                closing = rng.choice(CLOSINGS[split]) if label in ("danger", "deadline") and rng.random() < 0.3 else ""
                text = sentence(fill(spin(" ".join([*parts, closing]), rng), slots(split, rng)))
                if words(text) >= 8 and text not in seen:
                    seen.add(text)
                    kept += 1
                    made.append((text, label, f"{split}/{label.replace(' ', '-')}/{number:02d}"))
    rng.shuffle(made)
    return [{"id": f"last-year-{split}-{i:03d}", "prompt": text, "completion": label, "group": group} for i, (text, label, group) in enumerate(made, 1)]
