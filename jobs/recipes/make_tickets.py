"""The demo task "tickets": a support message in, a small JSON ticket out.

Writes `tickets.train.jsonl`, `tickets.eval.jsonl` (conversations) and `tickets.base-prompt.jsonl` (the schema and
an example, which give an untuned model a fair chance), the same bytes for the same seed:

    python -m jobs.recipes.make_tickets                # jobs/recipes/data/
    python -m jobs.recipes.make_tickets --baseline     # what counting words achieves on the same split

A message names its product by a description, its category by what went wrong, its severity by how hard the customer is
hit. No wording, customer or order number of the evaluation rows occurs in training, and half of the messages speak of a
second product or category, or carry a number that is no order, so that the words alone do not give the answer away.
Standard library only, but for `--baseline`. The scoring is in `service/evaluation/task.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SYSTEM_PROMPT = "Turn the message into a JSON ticket."
NUM_ROWS = {"train": 400, "eval": 64}
FIELDS = ("product", "category", "severity", "order")
DATA = Path(__file__).parent / "data"

# In every table: value -> (wordings for training, wordings for evaluation), separated by `|`. {p} is a product.
Table = dict[str, tuple[str, str]]

PRODUCTS: Table = {
    "camera": (
        """the camera over the garage|the porch camera|my outdoor cam|the lens above the gate|the thing filming the
driveway|the nursery video monitor|the gadget that records the yard|the video doorbell|the unit that watches the
hallway|the little eye on the shelf|the night-vision device|the security cam|the motion recorder in the shed|the garden
webcam|the surveillance unit|the footage recorder|the baby cam|the swivelling cam|the video gadget in the attic|the
lens that watches the dog|the cam""",
        """the webcam watching the stairs|the recorder filming our porch|the surveillance lens over the carport|the
nursery cam|the night-vision camera|the video unit by the pool|the pet cam|the thing that films the cellar""",
    ),
    "router": (
        """the router|the wifi box|the internet box in the hall|the mesh unit upstairs|the wireless base station|the
modem|the hub that gives us internet|the broadband box|the network box|the access point in the loft|the box with the
antennas|the WLAN repeater|the gadget that spreads the wifi|my internet gateway|the wifi booster|the network switch|the
ethernet box|the thing we get online with|the wifi extender|the internet hub in the study|the network hub""",
        """the wireless router|the wifi hub in the den|the internet modem upstairs|the box giving us broadband|the mesh
wifi node|the antenna box for the internet|the network gateway|the wifi repeater in the attic""",
    ),
    "thermostat": (
        """the thermostat|the heating dial|the temperature control in the hall|the heating controller|the thing that
sets how warm it gets|the wall unit for the radiators|the climate panel|the boiler control|the radiator valve|the
warmth regulator|the gadget that turns the heating down|the room temperature sensor|the heating timer|the display that
shows the degrees|the AC control|the heat regulator|the dial for the floor heating|the climate controller|the unit that
runs the furnace|the heater switch|the temperature dial""",
        """the bedroom thermostat|the dial that sets the degrees|the boiler panel|the climate dial|the thing that
controls the radiators|the heating regulator|the temperature unit|the furnace timer""",
    ),
    "lock": (
        """the lock|the smart lock|the keypad at the entrance|the bolt on the back door|the deadbolt|the code lock|the
keyless latch|the fingerprint lock|the thing that bolts the door|the door latch|the electronic bolt|the PIN pad on the
gate|the lock cylinder|the entry keypad|the gadget that replaces our house key|the bolt motor|the door opener|the
keyless entry unit|the shed padlock|the latch of the garage door|the door bolt""",
        """the keyless bolt|the door keypad|the electronic latch at the entrance|the garage padlock|the code pad by the
door|the fingerprint bolt|the thing that locks the door|the patio lock""",
    ),
    "speaker": (
        """the speaker|the kitchen speaker|the soundbar|the music box in the den|the voice assistant|the bluetooth
boombox|the thing that plays the radio|the subwoofer|the talking box on the counter|the loudspeaker|the stereo unit|the
audio pod|the gadget we play songs on|the sound system|the bathroom radio|the tweeter in the lounge|the wireless sound
box|the party music box|the bass box|the hi-fi unit|the music player""",
        """the bedroom loudspeaker|the audio box in the kitchen|the bluetooth soundbar|the pod that plays our music|the
stereo in the lounge|the radio speaker|the bass speaker|the thing we hear songs on""",
    ),
}

PROBLEMS: Table = {
    "defect": (
        """{p} is dead|{p} switches itself off every hour|{p} will not turn on any more|a crack runs through {p}|{p}
freezes all the time|{p} broke after two days|{p} gets hot and shuts down|{p} stays black|{p} no longer reacts to
anything|since the storm {p} does nothing|{p} restarts again and again|the battery of {p} dies within an hour|a button
on {p} fell off|{p} stopped working after the storm|{p} quit on us last night|{p} only flickers now|{p} shuts down at
random|{p} is defective|{p} is broken|{p} crashes every day|the case of {p} snapped""",
        """{p} stopped working|{p} keeps crashing|{p} does not turn on|{p} went dead overnight|{p} broke last night|{p}
shuts itself off|{p} has a crack in its case""",
    ),
    "delivery": (
        """{p} has not arrived|the parcel with {p} is lost|the courier never brought {p}|you sent {p} to my old
address|the tracking of {p} has not moved in a week|I am still waiting for {p} to be shipped|{p} has not been
delivered|{p} was delivered to some neighbour|the driver took {p} back to the depot|when will {p} arrive|the shipment
with {p} is stuck at customs|{p} was due on Monday and never came|the postman dropped {p} at the wrong house|you
shipped {p} twice|the package came without {p}|where is the parcel with {p}|can {p} be delivered to my office|the
carrier says {p} is still in the warehouse|please ship {p} a week later|the delivery of {p} is late|what day does {p}
get here""",
        """the package with {p} has not arrived|{p} is still not delivered|the courier took {p} to the wrong
address|the shipment with {p} is stuck in a depot|you shipped {p} to the wrong house|the parcel with {p} was due last
week and never came|when will the parcel with {p} arrive""",
    ),
    "billing": (
        """you charged me twice for {p}|the invoice for {p} is wrong|I was billed too much for {p}|my refund for {p} is
missing|the discount on {p} was not applied|my card was charged for {p} again|I need a receipt for {p}|the tax on the
bill for {p} looks off|I want my money back for {p}|the price of {p} changed at checkout|can I pay for {p} in
instalments|the payment for {p} shows as open|you still bill me monthly for {p}|the voucher did not lower the price of
{p}|please put my company on the invoice for {p}|an unknown fee was added for {p}|the bank shows a double payment for
{p}|you took the money for {p} two times|the bill lists {p} at the full price|the amount you charged for {p} is
wrong|where is the refund for {p}""",
        """I paid twice for {p}|the bill for {p} is too high|when do I get the refund for {p}|the charge for {p} on my
card is wrong|I need an invoice for {p}|the discount for {p} is missing on the bill|you took the payment for {p} two
times""",
    ),
    "setup": (
        """how do I connect {p} to my phone|which cable goes where on {p}|how is {p} mounted on a wall|what do I press
first to install {p}|I need help setting up {p}|where is the guide for installing {p}|how do I pair {p} with the
tablet|what screws do I need to mount {p}|can you walk me through the setup of {p}|how do I change the language of
{p}|how do I set the schedule of {p}|how do I get started with {p}|I do not understand the manual for {p}|how do I
connect {p} to the new network|where on the wall do I hang {p}|how do I set {p} to night mode|the instructions for {p}
are unclear|how do I configure {p}|where do I plug in {p}|please explain how {p} is wired|what is the first step to set
up {p}""",
        """how do I install {p}|how do I pair {p} with a phone|I cannot follow the manual for {p}|how should {p} be
wired|what is the way to configure {p}|where on the wall is {p} mounted|please explain how to set up {p}""",
    ),
    "account": (
        """I cannot log in to the app for {p}|my password for {p} is rejected|please change the email on the login for
{p}|I am shut out of my account with {p}|the reset mail for the login to {p} never comes|I forgot the password for
{p}|my profile no longer lists {p}|please delete my user profile and {p}|the sign-in code for {p} is refused|move {p}
to my wife's account|somebody else is signed in as owner of {p}|the app for {p} says my user is unknown|I cannot sign
in to manage {p}|my username for {p} has a typo|please close the account that holds {p}|the login code for {p} is not
accepted|my login for {p} has expired|please add my son as a user of {p}|the account behind {p} is blocked|merge my two
logins for {p}|my email is not accepted in the login for {p}""",
        """the login for {p} fails|I cannot get into my account for {p}|the app for {p} rejects my password|please put
a new email on the account with {p}|the sign-in for {p} says unknown user|I lost the password for {p}|transfer {p} to
my brother's account""",
    ),
}

# What is all right, and so is not the ticket's category.
FINE: Table = {
    "defect": (
        """it works well|nothing is broken|the hardware is fine|it is not defective""",
        """it is not broken|it works fine""",
    ),
    "delivery": (
        """the parcel came on time|the delivery was quick|the courier was great|it arrived on time""",
        """the delivery was fast|the parcel came early""",
    ),
    "billing": (
        """the payment is settled|the invoice was right|I want no refund|the bill is fine""",
        """the invoice is correct|I need no refund""",
    ),
    "setup": (
        """the installation was easy|setting it up went well|I know how to install it|the manual was clear""",
        """the setup was easy|installing it was simple""",
    ),
    "account": (
        """my login works|the password is fine|my account is in order|signing in is no problem""",
        """the login is fine|my account works""",
    ),
}
# What has not arrived is neither working nor installed.
CAN_BE_FINE = {category: [c for c in FINE if c != category] for category in FINE} | {"delivery": ["billing", "account"]}

OTHER_PRODUCT = (
    """{q} is fine, but {x}|nothing wrong with {q}, but {x}|{q} is no trouble, but {x}|I do not mean {q}: {x}|this is not
about {q}: {x}|{x}. This is not about {q}|{x}. I do not mean {q}|{x}. There is nothing wrong with {q}""",
    "{q} is okay, but {x}|all is well with {q}, but {x}|I am not talking about {q}: {x}|{x}. I am not talking about {q}",
)

SEVERITIES: Table = {
    "urgent": (
        """please fix this today|I need help today|it has to be solved today|this is an emergency|an emergency, please
call|we have an emergency here|help us right now|I need it right now|please act at once|somebody must call at once|this
cannot wait|urgent, this cannot wait until tomorrow""",
        """I need it fixed today|it is a real emergency|please call right now|help us at once|it is urgent and
cannot wait|somebody must help us today""",
    ),
    "normal": (
        """please fix it this week|I need an answer this week|it should be solved this week|a reply within a few days
is fine|please solve it in a few days|we can bridge a few days|annoying, but we manage for now|we manage with a spare
for now|it is annoying, though we manage|no emergency, but please answer this week|it cannot wait for months, but a few
days are fine|we manage until the weekend""",
        """please look at it this week|I would like an answer this week|please answer within a few days|it would be nice to
have it within a few days|annoying, but we manage with a spare|it is annoying, but we can bridge a few days""",
    ),
    "minor": (
        """no hurry|there is no hurry at all|no hurry, answer whenever you like|it can wait for months|it can wait, take
your time|take your time with it|reply whenever you like|whenever you have time|it is not urgent at all|not urgent, I
am just curious|I am just curious|I only ask because I am curious""",
        """no hurry with this|there is really no hurry|take your time, it can wait for months|answer whenever you like, no
hurry|it is not urgent, I am curious|I was just curious, no hurry""",
    ),
}

ORDERS = (
    "order {o}|my order number is {o}|it was order {o}|ordered as {o}|order no. {o}|I bought it as order {o}|order: {o}",
    "the order is {o}|the order number is {o}|this is order {o}|bought as order {o}",
)
# Numbers that are no order: {o} has the same form as one.
OTHER_NUMBERS = (
    """the serial number is {o}|it says model {o}|part {o}|call extension {n}|I paid {n} euros|my postcode is {n}|the
sticker reads {o}|firmware {o}|phone me on {n}|it is product code {o}""",
    "its serial number is {o}|it is model {o}|my extension is {n}|I paid {n} dollars|phone me: {n}",
)
NAMES = (
    "Mia|Ben|Aisha|Tom|Lena|Omar|Grace|Felix|Nina|Paul|Yuki|Carla|Ivan|Ruth|Sam|Elif|Jonas|Priya|Marc|Zoe",
    "Otto|Hanna|Diego|Leila|Victor|Amara|Kenji|Sofia",
)
SIGNATURES = ("Thanks, {name}|{name}|Greetings, {name}|{name} here", "Best, {name}|Yours, {name}|This is {name}")
PREFIXES = ("ABCDEFGH", "KMRT")


def base_prompt() -> list[dict[str, str]]:
    """What stands before the message for a model that was not tuned: fields, closed sets, meanings, and an example."""
    schema = """Turn the customer's message into one JSON object with four fields and write nothing else.
"product": "camera", "router", "thermostat", "lock" or "speaker": what the message is about.
"category": "defect" (broken), "delivery" (shipping), "billing" (payment, invoice, refund), "setup" (installing, using) \
or "account" (login, password).
"severity": "urgent" (today), "normal" (within days) or "minor" (no hurry).
"order": the order number as written, or null if there is none. Serial, model and phone numbers are no orders."""
    message = "The parcel was quick, but the doorbell cam is dead. Order Z-55555. Please come today."
    ticket: dict[str, str | None] = {
        "product": "camera",
        "category": "defect",
        "severity": "urgent",
        "order": "Z-55555",
    }
    turns = (("system", schema), ("user", message), ("assistant", _compact(ticket)))
    return [{"role": role, "content": content} for role, content in turns]


def wordings(packed: str) -> list[str]:
    """The phrases of one table cell."""
    return [" ".join(phrase.split()) for phrase in packed.split("|")]


def messages(rng: random.Random, split: str) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Endless (message, ticket) pairs in the wordings of `split`, train or eval."""
    side = list(NUM_ROWS).index(split)

    def pick(cell: tuple[str, str]) -> str:
        return rng.choice(wordings(cell[side]))

    def number() -> str:
        return f"{rng.choice(PREFIXES[side])}-{10000 + 2 * rng.randrange(45000) + side}"

    while True:
        product, category, severity = (rng.choice(list(table)) for table in (PRODUCTS, PROBLEMS, SEVERITIES))
        order = number() if rng.random() < 0.65 else None
        topic = pick(PROBLEMS[category]).format(p=pick(PRODUCTS[product]))
        twist = rng.random()
        if twist < 0.30:
            other = rng.choice([name for name in PRODUCTS if name != product])
            topic = pick(OTHER_PRODUCT).format(q=pick(PRODUCTS[other]), x=topic)
        elif twist < 0.50:
            fine = pick(FINE[rng.choice(CAN_BE_FINE[category])])
            topic = rng.choice([f"{fine}. {topic}", f"{topic}. {fine}"])
        rest = [pick(SEVERITIES[severity])]
        if order:
            rest.append(pick(ORDERS).format(o=order))
        if rng.random() < (0.15 if order else 0.6):
            rest.append(pick(OTHER_NUMBERS).format(o=number(), n=rng.randrange(101, 9999)))
        rng.shuffle(rest)
        rest.insert(0 if rng.random() < 0.7 else 1, topic)
        if rng.random() < 0.25:
            rest.append(pick(SIGNATURES).format(name=pick(NAMES)))
        yield _sentences(rest), {"product": product, "category": category, "severity": severity, "order": order}


def _sentences(clauses: list[str]) -> str:
    parts = [part for clause in clauses for part in clause.split(". ") if part]
    text = ". ".join(part[0].upper() + part[1:] for part in parts) + "."
    return re.sub(r"((?:^|\. )(?:How|What|Which|Where|When|Can|Is|Who) [^.]*)\.", r"\1?", text)


def make_rows(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """The conversations of one split, without duplicates."""
    rows: dict[str, dict[str, Any]] = {}
    for text, ticket in messages(random.Random(f"{split}-{seed}"), split):
        turns = (("system", SYSTEM_PROMPT), ("user", text), ("assistant", _compact(ticket)))
        rows[text] = {"messages": [{"role": role, "content": content} for role, content in turns]}
        if len(rows) == NUM_ROWS[split]:
            return list(rows.values())
    raise AssertionError("messages() never ends")


def write(out: Path, seed: int = 0) -> list[Path]:
    """Both splits and the base's prompt under `out`."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {f"tickets.{split}.jsonl": _jsonl(make_rows(split, seed)) for split in NUM_ROWS}
    texts["tickets.base-prompt.jsonl"] = _jsonl([{"messages": base_prompt()}])
    for name, text in texts.items():
        (out / name).write_bytes(text.encode())
    return [out / name for name in texts]


def _compact(ticket: dict[str, str | None]) -> str:
    return json.dumps(ticket, separators=(",", ":"))


def _jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def baseline(seed: int = 0) -> dict[str, float]:
    """Accuracy of counting words: logistic regression per closed-set field, a regular expression for the order."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, tickets = {}, {}
    for split in NUM_ROWS:
        rows = [row["messages"] for row in make_rows(split, seed)]
        texts[split] = [turns[1]["content"] for turns in rows]
        tickets[split] = [json.loads(turns[2]["content"]) for turns in rows]
    counts = CountVectorizer(ngram_range=(1, 1))
    train, held_out = counts.fit_transform(texts["train"]), counts.transform(texts["eval"])
    guesses: dict[str, list[str | None]] = {"order": [_first_number(text) for text in texts["eval"]]}
    for field in FIELDS[:3]:
        model = LogisticRegression(max_iter=1000).fit(train, [ticket[field] for ticket in tickets["train"]])
        guesses[field] = list(model.predict(held_out))
    right = [[guesses[field][i] == ticket[field] for field in FIELDS] for i, ticket in enumerate(tickets["eval"])]
    scores = {field: sum(row[i] for row in right) / len(right) for i, field in enumerate(FIELDS)}
    return scores | {"all fields": sum(all(row) for row in right) / len(right)}


def _first_number(text: str) -> str | None:
    match = re.search(r"[A-Z]-\d{5}", text)
    return match[0] if match else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jobs.recipes.make_tickets", description="Write the tickets data.")
    parser.add_argument("--out", type=Path, default=DATA, help="directory to write to (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another set of rows (default: %(default)s)")
    parser.add_argument("--baseline", action="store_true", help="score a bag of words instead of writing")
    args = parser.parse_args()
    if not args.baseline:
        for path in write(args.out, args.seed):
            print(path)
        return
    try:
        scores = baseline(args.seed)
    except ImportError:
        parser.error("--baseline needs scikit-learn, which is not installed. Run: pip install scikit-learn")
    for name, share in scores.items():
        print(f"{name:<12}{share:6.3f}")


if __name__ == "__main__":
    main()
