"""What may befall any request to a bucket, by chance, and the same chance each time."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from faulty import Fault, refusal

# Most answers are shorter, so that some of them come whole before the connection ends.
_MOST_BYTES = 500
Kind = Callable[[random.Random, str], Fault]


def busy(chance: random.Random, method: str) -> Fault:
    status, code = chance.choice([(500, "InternalError"), (503, "ServiceUnavailable"), (503, "SlowDown")])
    return Fault(answer=refusal(status, code)(method))


def refused(_: random.Random, method: str) -> Fault:
    return Fault(answer=refusal(403, "AccessDenied")(method))


def expired(_: random.Random, method: str) -> Fault:
    return Fault(answer=refusal(400, "ExpiredToken")(method))


def cut_off(chance: random.Random, _: str) -> Fault:
    return Fault(cut=chance.randrange(_MOST_BYTES))


def reset_in_the_answer(chance: random.Random, _: str) -> Fault:
    return Fault(cut=chance.randrange(_MOST_BYTES), reset=True)


def reset_in_the_request(chance: random.Random, _: str) -> Fault:
    return Fault(request_cut=chance.randrange(_MOST_BYTES))


def anything(chance: random.Random, method: str) -> Fault:
    return chance.choice([busy, refused, expired, cut_off, reset_in_the_answer, reset_in_the_request])(chance, method)


@dataclass
class Weather:
    """Decides for each request whether it is spared, until it clears up."""

    kind: Kind
    rate: float
    seed: int
    bad: bool = True
    struck: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)  # noqa: S311 - no secret

    def choose(self, request: str) -> Fault | None:
        with self._lock:
            if not self.bad or self._chance.random() >= self.rate:
                return None
            self.struck += 1
            return self.kind(self._chance, request.split(maxsplit=1)[0])
