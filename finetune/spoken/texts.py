"""Texts of the demonstration's dialogues come from a small grammar of everyday topics.

A sentence belongs either to training or to evaluation, for ever and whatever the seed: a checksum
of its letters decides. Evaluation therefore never reads a sentence aloud that was trained on.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "eval"]

_EVAL_ONE_IN = 4  # sentences
_MAX_TRIES = 10_000

_SLOTS: dict[str, tuple[str, ...]] = {
    "animal": ("a cat", "a dog", "a horse", "a little bird", "a rabbit", "a gray mouse"),
    "color": ("red", "blue", "green", "yellow", "white", "black", "brown"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "drink": ("coffee", "green tea", "cold milk", "orange juice", "water with lemon"),
    "family": ("my brother", "my sister", "my mother", "my father", "my cousin", "my neighbor"),
    "feeling": ("happy", "a bit tired", "calm", "curious", "full of energy", "relaxed"),
    "food": ("soup", "rice with beans", "fresh bread", "an apple pie", "pasta", "a big salad"),
    "hobby": ("painting", "swimming", "reading", "running", "cooking", "playing the piano"),
    "hour": ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "month": ("January", "March", "April", "June", "July", "September", "October"),
    "name": ("Anna", "Peter", "Maria", "David", "Julia", "Thomas", "Emma", "Oscar"),
    "place": ("the park", "the library", "the market", "the museum", "the old harbor", "the lake"),
    "room": ("kitchen", "garden", "living room", "bedroom", "hall"),
    "season": ("spring", "summer", "autumn", "winter"),
    "thing": ("a book", "a lamp", "a bicycle", "a warm coat", "a map of the city", "a new chair"),
    "transport": ("the bus", "the train", "a taxi", "the tram", "a boat"),
    "weather": ("sunny", "rainy", "windy", "cloudy", "cold and clear", "warm and dry"),
}


@dataclass(frozen=True)
class Exchange:
    """A few turns that belong together, the speakers alternating; each turn has several wordings.

    `facts` are rows of values that go together, under `names`; all other slots are free.
    """

    turns: tuple[tuple[str, ...], ...]
    names: tuple[str, ...] = ()
    facts: tuple[tuple[str, ...], ...] = field(default=((),))


_GREETINGS = (
    Exchange(
        (
            (
                "Hello, {name}.",
                "Hi, {name}.",
                "Hello, {name}, how are you this {day}?",
                "Good morning, {name}, nice to hear you.",
                "Hi there, {name}, what a {weather} {day}.",
                "Good evening, it is {name}, and I have {hour} questions.",
            ),
            (
                "Hi, {name2}.",
                "I am {feeling}, thank you.",
                "Hello, I feel {feeling} today, thank you.",
                "Hi, I am {feeling}, and how about you?",
                "Good to hear you, I was just {hobby} with {family}.",
                "Welcome back, I am {feeling} and ready to talk.",
            ),
        )
    ),
)

_TOPICS = (
    Exchange(
        (
            (
                "What is the capital of {country}?",
                "Do you know the capital of {country}?",
                "Which city is the capital of {country}?",
                "Tell me the main city of {country}.",
            ),
            (
                "The capital of {country} is {capital}.",
                "That is {capital}, in the {side} of {country}.",
                "It is {capital}, and it is lovely in {month}.",
                "I believe it is {capital}, a city in the {side}.",
            ),
        ),
        ("country", "capital", "side"),
        (
            ("France", "Paris", "north"),
            ("Italy", "Rome", "middle"),
            ("Spain", "Madrid", "middle"),
            ("Norway", "Oslo", "south"),
            ("Poland", "Warsaw", "east"),
            ("Greece", "Athens", "south"),
            ("Japan", "Tokyo", "east"),
            ("Egypt", "Cairo", "north"),
            ("Kenya", "Nairobi", "south"),
            ("Portugal", "Lisbon", "west"),
        ),
    ),
    Exchange(
        (
            (
                "How many legs does {creature} have?",
                "Tell me how many legs {creature} has.",
                "Can you count the legs of {creature} for {name}?",
            ),
            (
                "Most people know that {creature} has {legs} legs.",
                "It has {legs} legs, {name} told me on {day}.",
                "As far as I know, {creature} walks on {legs} legs.",
            ),
        ),
        ("creature", "legs"),
        (
            ("a spider", "eight"),
            ("an ant", "six"),
            ("a cat", "four"),
            ("a bird", "two"),
            ("a horse", "four"),
            ("a bee", "six"),
            ("a crab", "ten"),
        ),
    ),
    Exchange(
        (
            (
                "What will the weather be like on {day}?",
                "Will it be {weather} on {day}?",
                "How is the weather near {place} on {day}?",
            ),
            (
                "On {day} it will be {weather}, so take {thing} with you.",
                "I think that it will be {weather} until {hour}.",
                "It looks {weather} in the morning and {weather2} in the evening.",
            ),
            (
                "Then I will go to {place} with {family}.",
                "In that case I stay at home with {food} and {drink}.",
                "That is fine, I like it when it is {weather2}.",
            ),
        )
    ),
    Exchange(
        (
            (
                "What did you eat on {day}?",
                "Have you had {food} this week?",
                "Would you like some {drink} with your dinner?",
                "What should I cook for {name}?",
            ),
            (
                "I would make {food} and serve it with {drink}.",
                "On {day} we had {food}, and it was very good.",
                "For {family} I always make {food} in the {season}.",
            ),
            (
                "I prefer {food2} with a glass of {drink}.",
                "Please write that down for {name}.",
                "Is there any {drink} left in the {room}?",
            ),
        )
    ),
    Exchange(
        (
            (
                "How do I get to {place} from here?",
                "When does {transport} leave for {place}?",
                "Is it far from {place} to {place2}?",
            ),
            (
                "Take {transport} at {hour} and get off at {place}.",
                "It leaves at {hour}, and you need {hour2} minutes to {place}.",
                "Walk past {place} and turn left at {place2}.",
            ),
            (
                "Then I will meet {name} there at {hour2}.",
                "And is there {transport} on {day} as well?",
                "Can I bring {animal} on {transport}?",
            ),
        )
    ),
    Exchange(
        (
            (
                "Do you have any plans for {day}?",
                "What are you doing on {day} at {hour}?",
                "Shall we go to {place} on {day}?",
            ),
            (
                "On {day} I am {hobby} with {name}.",
                "I would love to, but {family} comes to visit on {day}.",
                "Let us meet at {place} at {hour} and bring {thing}.",
                "At {hour} I have to buy {thing} for {name}.",
            ),
            (
                "Then let us try {day2} at {hour2}.",
                "That sounds good, I will bring {drink} and {food}.",
                "All right, tell {family} that I said hello.",
            ),
        )
    ),
    Exchange(
        (
            (
                "Where did you leave {thing}?",
                "Have you seen {thing} in the {room}?",
                "Whose is the {color} box in the {room}?",
            ),
            (
                "It is in the {room}, next to the {color} box.",
                "I gave it to {name} on {day}.",
                "Look behind the {color} door of the {room}.",
            ),
            (
                "Thank you, I found it in the {room}.",
                "No, there is only {animal} in the {room}.",
                "The {color2} one belongs to {family}.",
            ),
        )
    ),
    Exchange(
        (
            (
                "What do you like to do in {season}?",
                "Did you ever try {hobby} in {season}?",
                "Who taught you {hobby}?",
            ),
            (
                "In {season} I like {hobby} more than {hobby2}.",
                "It was {family} who showed me {hobby} in {month}.",
                "I started {hobby} in {month} together with {name}.",
            ),
            (
                "I would rather be {hobby2} at {place}.",
                "For me {hobby} is best on a {weather} day.",
                "Then you should ask {name} about {hobby2}.",
            ),
        )
    ),
    Exchange(
        (
            (
                "What does {animal} look like to you?",
                "Would you rather have {animal} or {animal2}?",
                "Does {name} still have {animal}?",
            ),
            (
                "I once saw {animal} near {place}, it was {color}.",
                "Yes, and its name is {name}, it sleeps in the {room}.",
                "I would choose {animal}, if {family} agrees.",
            ),
            (
                "I hope that it likes {food}.",
                "In {season} it runs around in the {room}.",
                "{name} would be {feeling} about that.",
            ),
        )
    ),
    Exchange(
        (
            (
                "How much is {number} plus {number2}?",
                "Can you add {number} and {number2}?",
                "What do you get for {number} and {number2} together?",
            ),
            (
                "If you add {number} and {number2}, you get {total}.",
                "That makes {total}, I counted it for {name}.",
                "It is {total}, as every child in {place} knows.",
            ),
        ),
        ("number", "number2", "total"),
        (
            ("one", "two", "three"),
            ("two", "five", "seven"),
            ("three", "three", "six"),
            ("four", "five", "nine"),
            ("five", "six", "eleven"),
            ("six", "two", "eight"),
            ("seven", "three", "ten"),
            ("eight", "four", "twelve"),
            ("nine", "one", "ten"),
        ),
    ),
)

BACKCHANNELS = (
    "Mhm.", "I see.", "Right.", "Oh, nice.", "Okay.", "Sure.", "Of course.", "Really?", "Uh huh.",
    "Yes.", "I know.", "Great.", "True.", "Hm.", "Good.", "Wow.",
)  # fmt: skip


def sentences_of(text: str) -> list[str]:
    """The sentences of a turn, without their white space."""
    return re.findall(r"[^.?!]+[.?!]", text.replace("\n", " ").strip())


def split_of(sentence: str) -> Split:
    """The split that may use `sentence`, for every seed and every number of dialogues."""
    letters = re.sub(r"[^a-z]", "", sentence.lower())
    return "eval" if zlib.crc32(letters.encode()) % _EVAL_ONE_IN == 0 else "train"


def greeting(rng: random.Random, split: Split) -> list[str]:
    """The turns of an opening; the speakers alternate."""
    return _expand(rng, split, _GREETINGS)


def topic(rng: random.Random, split: Split) -> list[str]:
    """Two or three turns on one topic; the speakers alternate."""
    return _expand(rng, split, _TOPICS)


def backchannel(rng: random.Random, split: Split) -> str:
    """A word or two that one says while the other speaks."""
    return rng.choice([text for text in BACKCHANNELS if split_of(text) == split])


def corpus(num_turns: int, seed: int = 0) -> list[str]:
    """`num_turns` turns or more of the train split, such as a tokenizer is trained on."""
    rng = random.Random(f"corpus {seed}")
    turns = [text for text in BACKCHANNELS if split_of(text) == "train"]
    while len(turns) < num_turns:
        turns += greeting(rng, "train") if rng.random() < 0.2 else topic(rng, "train")
    return turns


def _expand(rng: random.Random, split: Split, exchanges: tuple[Exchange, ...]) -> list[str]:
    """Draws an exchange, and wordings and slots until every sentence of it is in `split`."""
    exchange = rng.choice(exchanges)
    for _ in range(_MAX_TRIES):
        slots = {name: rng.sample(values, 2) for name, values in _SLOTS.items()}
        values = {name: pair[0] for name, pair in slots.items()}
        values |= {f"{name}2": pair[1] for name, pair in slots.items()}
        values |= dict(zip(exchange.names, rng.choice(exchange.facts), strict=True))
        turns = [rng.choice(wordings).format(**values) for wordings in exchange.turns]
        if all(split_of(sentence) == split for turn in turns for sentence in sentences_of(turn)):
            return turns
    raise AssertionError(f"no wording of {exchange.turns[0]} is in the {split} split")
