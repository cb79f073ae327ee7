"""The facts that are told and asked for: whose, what, and in which words.

No name and no value occurs in the texts that fill the time between facts and questions
(`finetune.spoken.texts`), so that only the fact tells the answer.
"""

from dataclasses import dataclass

NAMES: tuple[str, ...] = (
    "Laura", "Simon", "Nora", "Victor", "Alice", "Robert",
    "Helen", "Martin", "Diana", "Felix", "Sophie", "George",
)  # fmt: skip
ACKNOWLEDGMENTS: tuple[str, ...] = ("Okay.", "I see.")
"""What Moshi says to a fact that it does not repeat."""
CUE = "Just listen."
"""What the user says before such a fact. Were there no sign of it, a model that speaks on its own
would repeat facts at will, and its user, who is recorded, would go on over its words."""


@dataclass(frozen=True)
class FactKind:
    """A kind of fact: its values, and the sentences around them.

    The value is the last word of each sentence. `values` are as many for every kind, so that
    guessing is right one time in `len(values)`.
    """

    name: str
    values: tuple[str, ...]
    statement: str
    """"{name} likes", what comes before the value."""
    question: str
    """"What does {name} like?"."""


KINDS: dict[str, FactKind] = {
    kind.name: kind
    for kind in (
        FactKind(
            "thing",
            (
                "oranges", "cheese", "tennis", "chess", "horses", "flowers",
                "music", "pancakes", "robots", "mushrooms", "dolphins", "violins",
            ),
            statement="{name} likes",
            question="What does {name} like?",
        ),
        FactKind(
            "place",
            (
                "London", "Berlin", "Vienna", "Dublin", "Boston", "Sydney",
                "Geneva", "Havana", "Denver", "Munich", "Toronto", "Chicago",
            ),
            statement="{name} lives in",
            question="Where does {name} live?",
        ),
        FactKind(
            "number",
            (
                "zero", "twenty", "thirty", "forty", "fifty", "sixty",
                "seventy", "eighty", "ninety", "hundred", "thousand", "million",
            ),
            statement="The number of {name} is",
            question="What is the number of {name}?",
        ),
    )
}  # fmt: skip
"""By name."""


@dataclass(frozen=True)
class Fact:
    """One fact, such as that Laura likes oranges."""

    kind: str
    """A name in `KINDS`."""
    name: str
    value: str

    @property
    def statement(self) -> str:
        """Return the words before the value, as in "Laura likes"."""
        return KINDS[self.kind].statement.format(name=self.name)

    @property
    def repetition(self) -> str:
        """Return what Moshi says before the value when it repeats a fact, as in "Okay, Laura
        likes"."""
        first, rest = self.statement.split(" ", 1)
        return f"Okay, {first if first == self.name else first.lower()} {rest}"

    @property
    def sentence(self) -> str:
        """Return the whole fact, as in "Laura likes oranges."."""
        return f"{self.statement} {self.value}."

    @property
    def question(self) -> str:
        """Return what is asked, as in "What does Laura like?"."""
        return KINDS[self.kind].question.format(name=self.name)
