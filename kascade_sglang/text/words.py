"""Words that planted facts are made of, and the rule that holds some of them out.

Training uses only names and values with ``is_held_out(...) == False``; tests use only the
others, so that a right answer was read from the document and not remembered.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

ADJECTIVES = tuple(
    """
    amber ancient azure bitter blazing bold brave bright broken bronze calm careful cheerful
    clever cloudy cold copper coral crimson crooked curious dancing daring dark deep distant
    double dusty eager early eastern electric elegant empty fading faithful famous fancy fast
    fierce final flying foggy forgotten fragile frozen gentle giant gilded glad glass golden
    graceful grand green grey happy hidden hollow honest humble hungry icy idle iron ivory
    jolly keen kind laughing lazy light little lively lonely loud loyal lucky lunar marble
    mellow mighty misty modern narrow nervous new noble northern odd old orange pale patient
    perfect plain polite proud purple quick quiet rapid rare red restless rich royal rusty
    sacred sad scarlet secret sharp shiny short shy silent silver simple singing sleepy slow
    small smooth soft solar solid southern spotted stormy strange strong sudden sunny sweet
    swift tall tender tiny tired velvet violet wandering warm western white wild wise wooden
    yellow young
    """.split()
)
NOUNS = tuple(
    """
    anchor arrow badger barrel beacon bear beaver bee bell bison boat bridge bucket butterfly
    cactus camel candle canyon castle cat cedar chapel cloud comet compass cow crab crane crow
    crown deer desert dolphin dove dragon drum duck eagle elephant falcon feather fiddle fish
    flute forest fountain fox frog garden gate ghost giraffe glacier goat goose hammer harbor
    harp hawk hedge heron hill horse island jaguar kettle kite ladder lake lamp lantern lark
    lemon leopard lighthouse lily lion lizard maple meadow mill mirror monkey moon moose
    mountain mouse needle oak ocean orchard otter owl palace panda parrot pebble pelican
    penguin pigeon pine planet pony prairie rabbit raven ribbon river robin rocket rose saddle
    sail salmon scarf seal shark sheep shell ship sparrow spider spoon squirrel star statue
    stone swan table temple tiger tower train tree trumpet tulip turtle valley vessel violin
    wagon walrus whale wheel willow windmill wolf zebra
    """.split()
)
FIRST_NAMES = tuple(
    """
    Ada Alan Albert Anna Arthur Ben Carl Clara Daniel David Dora Edith Ella Emma Eric Felix
    Frank George Grace Harold Helen Henry Hugo Ida Iris Jack James Jane John Julia Karen Laura
    Leo Lewis Lucy Mark Martha Mary Max Nina Oscar Paul Peter Ralph Robert Rosa Ruth Sam Sarah
    Simon Susan Thomas Victor Walter William
    """.split()
)
LAST_NAMES = tuple(
    """
    Adams Baker Barnes Bell Bishop Brooks Brown Butler Carter Clark Cole Cook Cooper Dean
    Ellis Finch Fisher Ford Foster Gray Green Hall Harris Hart Hill Holmes Howard Hughes Hunt
    Hunter Jones King Knight Lane Lee Marsh Mason Miller Moore Morgan Nash Palmer Parker
    Pierce Porter Price Reed Rice Shaw Smith Stone Taylor Turner Wade Walker Ward Webb West
    White Wood Young
    """.split()
)
PHRASE_FIRST = tuple(
    """
    basic better broad central certain clean clear common daily direct eternal exact extra
    fair firm formal fresh full general global good great hard heavy high human inner large
    late legal local logical long lost major minor moral natural next open outer past poor
    popular present prime private proper public pure ready real regular right second serious
    single social special spiritual strict total true upper usual vast whole wide
    """.split()
)
PHRASE_SECOND = tuple(
    """
    account action answer army art bank battle beauty bread building business capital center
    chance circle class council country craft day doctor dream earth effort engine evening
    event faith family father field fire force freedom friend future glory ground group
    harvest heart history honor hour house journey judge justice labor land language law
    letter machine market measure memory method mind moment morning music nature night office
    order people place power prayer promise reason record reward road school science season
    servant shadow signal society soldier song sound spirit story summer system teacher
    thought time touch trade truth union victory village voice wall water winter woman work
    world
    """.split()
)
NUMBER_KINDS = (
    "access code",
    "locker number",
    "badge number",
    "serial number",
    "ticket number",
    "vault code",
    "invoice number",
    "safe number",
)
PHRASE_KINDS = ("password", "call sign", "code name", "secret phrase")
COUNTED = (("bell", "rang"), ("horn", "sounded"), ("alarm", "went off"), ("drum", "was beaten"))

PHRASE = re.compile(rf"\b({'|'.join(PHRASE_FIRST)}) ({'|'.join(PHRASE_SECOND)})\b")


@dataclass(frozen=True)
class Name:
    """What a fact is about: an adjective and a noun."""

    adjective: str
    noun: str

    def __str__(self) -> str:
        return f"{self.adjective} {self.noun}"


def is_held_out(text: str) -> bool:
    """Whether a name or a value is kept for tests (one in five, by checksum)."""
    return zlib.crc32(text.encode()) % 5 == 0


class Draw:
    """Draws names and values for one document: all from one split, none of them twice."""

    def __init__(self, rng: random.Random, split: str) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {split!r}")
        self.rng = rng
        self.held_out = split == "test"
        self.used: set[str] = set()

    def _fresh(self, text: str) -> bool:
        """Whether ``text`` may be used, which uses it up."""
        if text in self.used or is_held_out(text) != self.held_out:
            return False
        self.used.add(text)
        return True

    def name(self, adjective: str | None = None, noun: str | None = None) -> Name:
        """A name; give one of its words to get a name that is easy to confuse with another."""
        for _ in range(2000):
            name = Name(adjective or self.rng.choice(ADJECTIVES), noun or self.rng.choice(NOUNS))
            if self._fresh(str(name)):
                return name
        raise ValueError("no unused name is left for this document")

    def person(self) -> str:
        """A first and a last name."""
        while not self._fresh(
            person := f"{self.rng.choice(FIRST_NAMES)} {self.rng.choice(LAST_NAMES)}"
        ):
            pass
        return person

    def number(self) -> str:
        """Four digits."""
        while not self._fresh(number := str(self.rng.randint(1000, 9999))):
            pass
        return number

    def phrase(self) -> str:
        """Two ordinary words."""
        while not self._fresh(
            phrase := f"{self.rng.choice(PHRASE_FIRST)} {self.rng.choice(PHRASE_SECOND)}"
        ):
            pass
        return phrase
