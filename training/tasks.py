# SPDX-License-Identifier: Apache-2.0
"""The exercises of the embedded model: seeded generators of (prompt, answer) pairs.

A problem belongs to the held-out split when the hash of its canonical form falls in one twentieth of the hash range, so
training and evaluation never share a sum (in either order), a difference, a word or a recall context.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

TASKS = ("sum", "difference", "recall", "reverse", "sort", "count")
HELD_OUT_SHARE = 20  # one problem in this many is held out
LONGEST_ANSWER = 48  # tokens, with room to see an answer that does not end
LONG_RECALL_TOKENS = 1500  # bytes of the longest recall context in the evaluation

CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD_LIST = """
sun moon star tree leaf root seed wind rain snow river lake ocean stone sand hill valley field forest garden bird fish
horse tiger lion bear wolf eagle mouse sheep goat apple banana cherry lemon melon peach grape bread butter cheese
honey sugar salt pepper coffee house door window table chair paper pencil letter number planet rocket engine wheel
bridge street city village school teacher student doctor music guitar piano violin drum dance color red green blue
yellow purple orange silver golden summer winter spring autumn morning evening night hello world token kernel memory
tensor matrix vector python cat dog egg kitten rabbit turtle dragon castle knight sword cookie pillow mirror balloon
pretzel mammal success coffee letter pepper
"""
WORDS = tuple(word for word in WORD_LIST.split() if 3 <= len(word) <= 8)

SUM_PROMPTS = (
    "What is {a} + {b}?",
    "{a} + {b} =",
    "Add {a} and {b}.",
    "Compute {a} + {b}.",
    "What is the sum of {a} and {b}?",
)
DIFFERENCE_PROMPTS = (
    "What is {a} - {b}?",
    "{a} - {b} =",
    "Subtract {b} from {a}.",
    "Compute {a} - {b}.",
    "What is {a} minus {b}?",
)
REVERSE_PROMPTS = ("Reverse the word {w}.", "Spell {w} backwards.", "Write {w} in reverse.", "Reverse {w}.")
SORT_PROMPTS = ("Sort the letters of {w}.", "Put the letters of {w} in alphabetical order.", "Sort {w}.")
COUNT_PROMPTS = (
    "How many times does the letter {c} appear in {w}?",
    "How many {c}'s are in {w}?",
    "Count the letter {c} in {w}.",
    "In {w}, how many letters are {c}?",
    "How many letters of {w} are {c}?",
)
COUNT_FOLLOW_UPS = ("And {c}?", "And the letter {c}?", "How many {c}'s?", "{c}?")
LENGTH_PROMPTS = ("How many letters are in {w}?", "How many letters does {w} have?")
RECALL_PROMPTS = (
    "Remember these values: {pairs}. What is {k}?",
    "{pairs}. What is the value of {k}?",
    "Here is a list: {pairs}. Recall {k}.",
    "Given {pairs}, what is {k}?",
    "{pairs}. {k}=",
)
RECALL_FOLLOW_UPS = ("What is {k}?", "What is the value of {k}?", "Recall {k}.", "And {k}?", "{k}?", "{k}=")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a careful assistant. Give only the answer.",
)
ABOUT = "I am tiny-deepseek. I add, subtract, recall values from a list, and reverse, sort or count letters."
ABOUT_PROMPTS = (
    "Hello", "Hello!", "Hi", "Hi!", "Hello, who are you?", "Who are you?", "What are you?", "What can you do?", "Help",
    "What is your name?", "Hey", "hello", "hi",
)  # fmt: skip


@dataclass(frozen=True)
class Exercise:
    """One question with its only right answer, and the questions that may follow it in the same conversation."""

    task: str
    prompt: str
    answer: str
    follow_ups: tuple[tuple[str, str], ...] = ()


def is_held_out(problem: str) -> bool:
    """True when `problem`, in canonical form, must not be trained on."""
    return zlib.crc32(problem.encode()) % HELD_OUT_SHARE == 0


def draw_number(rng: random.Random) -> int:
    """A number of two (one in four) or three digits."""
    return rng.randint(10, 99) if rng.random() < 0.25 else rng.randint(100, 999)


def draw_word(rng: random.Random) -> str:
    """A word of 3 to 8 letters: real, pronounceable, random, or random over few letters (so that letters repeat)."""
    kind, length = rng.random(), rng.randint(3, 8)
    if kind < 0.1:
        return rng.choice(WORDS)
    if kind < 0.45:
        start = rng.randint(0, 1)
        return "".join(rng.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(length))
    letters = LETTERS if kind < 0.75 else rng.sample(LETTERS, rng.randint(2, 5))
    return "".join(rng.choice(letters) for _ in range(length))


def quote(rng: random.Random, word: str) -> str:
    return rng.choice((word, word, f"'{word}'", f'"{word}"'))


def pick(rng: random.Random, held_out: bool, draw):
    """Draw until the problem's canonical form, `draw`'s first item, lies in the wanted split."""
    while True:
        problem, *rest = draw()
        if is_held_out(problem) == held_out:
            return rest


def make_sum(rng: random.Random, held_out: bool) -> Exercise:
    def draw():
        a, b = draw_number(rng), draw_number(rng)
        return f"sum {min(a, b)} {max(a, b)}", a, b

    a, b = pick(rng, held_out, draw)
    return Exercise("sum", rng.choice(SUM_PROMPTS).format(a=a, b=b), str(a + b))


def make_difference(rng: random.Random, held_out: bool) -> Exercise:
    """A difference whose result is not negative."""

    def draw():
        b, a = sorted((draw_number(rng), draw_number(rng)))
        return f"difference {a} {b}", a, b

    a, b = pick(rng, held_out, draw)
    return Exercise("difference", rng.choice(DIFFERENCE_PROMPTS).format(a=a, b=b), str(a - b))


def pick_word(rng: random.Random, held_out: bool) -> str:
    def draw():
        word = draw_word(rng)
        return f"word {word}", word

    return pick(rng, held_out, draw)[0]


def make_reverse(rng: random.Random, held_out: bool) -> Exercise:
    word = pick_word(rng, held_out)
    return Exercise("reverse", rng.choice(REVERSE_PROMPTS).format(w=quote(rng, word)), word[::-1])


def make_sort(rng: random.Random, held_out: bool) -> Exercise:
    word = pick_word(rng, held_out)
    return Exercise("sort", rng.choice(SORT_PROMPTS).format(w=quote(rng, word)), "".join(sorted(word)))


def tally(word: str, counted: str) -> str:
    """The word spelled with a running count of the letters in `counted`, then the total: `c0 h0 e1 e2 s2 e3: 3`.

    A model this small counts reliably only step by step, as people do.
    """
    steps = [f"{letter}{sum(c in counted for c in word[: i + 1])}" for i, letter in enumerate(word)]
    return f"{' '.join(steps)}: {sum(c in counted for c in word)}"


def make_count(rng: random.Random, held_out: bool, num_follow_ups: int = 0) -> Exercise:
    """How often a letter occurs in a word (three in four; every answer from 0 to 3 is common), or the word's length.

    Follow-up questions ask for other letters of the same word. Answers spell the word with a running count: see `tally`.
    """

    def draw() -> tuple[str, str, str]:
        word, letter = draw_word(rng)[: rng.randint(3, 8)], rng.choice(LETTERS)
        if rng.random() < 0.2:
            letter = rng.choice(word)
        else:
            repeats = min(len(word), rng.choice((0, 1, 1, 2, 2, 3, 3, 4)))
            places = set(rng.sample(range(len(word)), repeats))
            others = [c if c != letter else rng.choice(LETTERS.replace(letter, "")) for c in word]
            word = "".join(letter if i in places else c for i, c in enumerate(others))
        return f"word {word}", word, letter

    word, letter = pick(rng, held_out, draw)
    asked = [rng.choice((rng.choice(word), letter, rng.choice(LETTERS))) for _ in range(num_follow_ups)]
    follow_ups = tuple((rng.choice(COUNT_FOLLOW_UPS).format(c=c), tally(word, c)) for c in asked)
    if rng.random() < 0.25:
        return Exercise("count", rng.choice(LENGTH_PROMPTS).format(w=quote(rng, word)), tally(word, word), follow_ups)
    prompt = rng.choice(COUNT_PROMPTS).format(c=letter, w=quote(rng, word))
    return Exercise("count", prompt, tally(word, letter), follow_ups)


def make_recall(rng: random.Random, held_out: bool, num_pairs: int, num_follow_ups: int = 0) -> Exercise:
    """`num_pairs` pairs such as `tak=417`, nine bytes each with the comma, then a question about one of them."""

    def draw():
        keys: dict[str, int] = {}
        while len(keys) < num_pairs:
            key = rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS)
            keys[key] = rng.randint(100, 999)
        pairs = ", ".join(f"{key}={value}" for key, value in keys.items())
        return pairs, pairs, keys

    pairs, keys = pick(rng, held_out, draw)
    asked = [rng.choice(list(keys)) for _ in range(1 + num_follow_ups)]
    prompt = rng.choice(RECALL_PROMPTS).format(pairs=pairs, k=asked[0])
    follow_ups = tuple((rng.choice(RECALL_FOLLOW_UPS).format(k=key), str(keys[key])) for key in asked[1:])
    return Exercise("recall", prompt, str(keys[asked[0]]), follow_ups)


def make_about(rng: random.Random) -> Exercise:
    return Exercise("about", rng.choice(ABOUT_PROMPTS), ABOUT)


MAKERS = {
    "sum": make_sum,
    "difference": make_difference,
    "reverse": make_reverse,
    "sort": make_sort,
    "count": make_count,
}


def held_out_exercises(
    task: str, num: int, seed: int = 0, recall_tokens: tuple[int, int] = (30, LONG_RECALL_TOKENS)
) -> list[Exercise]:
    """`num` held-out exercises of `task`; recall contexts are spread evenly over `recall_tokens` bytes."""
    rng = random.Random(f"{seed} {task}")
    if task != "recall":
        return [MAKERS[task](rng, True) for _ in range(num)]
    low, high = (max(1, tokens // 9 - 5) for tokens in recall_tokens)
    return [make_recall(rng, True, low + (high - low) * i // max(1, num - 1)) for i in range(num)]
