"""The numbers in the text of the notebooks and the README: each is in an output, a setting, a results file or a source.

Checked are percentages, decimals, whole numbers from 100 on, and "17 times", "7 points", "9 of 27", in every sentence,
list item, table and description of a picture. Not checked: other whole numbers below 100, numbers in words, and whether
a number that stands in some output is the one that the sentence means. What has to be exact in that way, or is computed
from numbers on the page, is in ARITHMETIC.
"""

import ast
import functools
import io
import json
import math
import pathlib
import re
import tokenize

import pytest
from scipy.special import stdtrit

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# For each text, words of it that hold one number, and how the number comes about. The numbers in an expression must be
# found by the rules for all others. t(n): Student's factor for a 95% interval of n values.
ARITHMETIC = {
    "01_clr_optimizer": {
        "slope `0.0015 //": "0.002 - 0.0005",
        "and `-0.15 //": "0.95 - 0.8",
        "grows 17 times": "0.3333 / 0.02",
    },
    "03_mnist_comparison": {
        "hundredth at 75%": "100 * 3 / 4",
        "by 12.7.": "t(2)",
        "weights by 2.5%": "100 * 0.004 * 0.00655 * 0.5 * 1875",  # the rate of 1cycle is half its peak in the mean
        "That is 0.14 points": "100 * (0.98 * 0.02 / 10000) ** 0.5",
    },
    "04_cifar_super_convergence": {
        "hundredth from 75%": "100 * 3 / 4",
        "or 53%": "100 * 0.999**628",
        "or 62%": "100 * 0.999**471",
        "than 2% is left": "100 * 0.999**4000",
        "could not go below 0.25": "2 * 0.5**3",
    },
    "06_beyond_one_cycle": {"is 1.9 times": "1 + 0.9", "a factor of 1.26": "10 ** (10 / 100)"},
    "README": {  # the parameters, layer by layer
        "40,558": "32 * (9 + 1) + 16 * (9 * 32 + 1) + 20 * (9 * 16 + 1) + 64 * (5 * 5 * 20 + 1) + 10 * (64 + 1)",
    },
}

# Not a part of a word (CIFAR-10) or of a version (3.15.1); but both ends of 0.1-3.5.
NUMBER = re.compile(
    r"(?<![\w.,])(?<![A-Za-z]-)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)(e[-+]?\d+)?(?!\w|[.,]\d)( ?%)?"
    r"(?= (times|points|of \d+)\b)?"
)
# Names, not results: a section of a paper, a notebook, the version of a library, a year, an arXiv id.
NAME = re.compile(
    r"\b(?:[Ss]ections?|[Ff]igures?|[Tt]ables?|[Nn]otebooks?|[Ee]xercises?|Keras|TensorFlow|Python)"
    r" \d[\d.]*[a-z]?\b(?:(?: and | to |, )\d[\d.]*[a-z]?\b)*|\b(?:19|20)\d\d\b(?!,)|\b\d{4}\.\d{5}\b"
)
SOURCE = re.compile(r"\]\((https?:|#References)")


class Number:
    """One number of a text: value, decimals, digits that count, if it is a percentage, and if it needs support."""

    def __init__(self, match):
        self.text = match[0]
        self.value = float(match[1].replace(",", "") + (match[2] or ""))
        self.decimals = len(match[1].partition(".")[2]) - int((match[2] or "e0")[1:])
        self.digits = len(re.sub(r"\D", "", match[1]).lstrip("0"))
        self.percent = bool(match[3])
        self.claims = bool(self.percent or match[4] or self.decimals > 0 or self.value >= 100)

    def is_rounded(self, exact):
        return abs(abs(exact) - self.value) <= 0.5 * 10.0**-self.decimals * (1 + 1e-9)

    def is_said_by(self, other):
        """Whether the other number of a text, with as many decimals or more, is this one."""
        if other.percent and self.value < 1 and self.is_rounded(other.value / 100):
            return True
        # So many numbers would round to a whole one, or to one with a single digit, that these must be the same.
        if self.percent and other.percent or self.decimals > 0 and self.digits > 1:
            return other.decimals >= self.decimals and self.is_rounded(other.value)
        return not self.percent and other.value == self.value


def numbers(text):
    return [Number(match) for match in NUMBER.finditer(NAME.sub("", text))]


@functools.cache
def cells_of(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def outputs(notebook):
    """The text of all outputs (of a picture, nothing), with accuracies that are printed as a share also in percent."""
    found = [output for cell in cells_of(notebook) for output in cell.get("outputs", [])]
    parts = [
        [o.get("text", ""), *(o.get("data", {}).get(f"text/{kind}", "") for kind in ("plain", "markdown"))]
        for o in found
    ]
    text = "\n".join("".join(part) for of_one in parts for part in of_one)
    return re.sub(r"accuracy (0\.\d\d+)", lambda match: f"{match[0]} ({100 * float(match[1]):g}%)", text)


def descriptions(notebook):
    """What is said of the pictures."""
    found = [output for cell in cells_of(notebook) for output in cell.get("outputs", [])]
    return [alt for output in found if (alt := output.get("metadata", {}).get("image/png", {}).get("alt"))]


def literals(code):
    """The numbers in code, without those in its comments and texts."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {float(ast.literal_eval(token.string)) for token in tokens if token.type == tokenize.NUMBER}


def settings(notebook):
    return set().union(*(literals(source(cell)) for cell in cells_of(notebook) if cell["cell_type"] == "code"))


@functools.cache
def recorded(name):
    """The runs in the results files of a notebook, without trials; each run and seed once, as recorded last."""
    files = sorted((ROOT / "figures" / "results").glob(f"{name[:2]}_*.jsonl"))
    texts = [file.read_text(encoding="utf-8") for file in files if "tuning" not in file.stem]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    return list({(line["experiment"], line["run"], line["seed"]): line for line in lines if "run" in line}.values())


def computed(expression):
    return eval(expression, {"__builtins__": {}, "t": lambda n: stdtrit(n - 1, 0.975)})


def sentences(markdown):
    """(sentence, context) of a text; the context of a list item or table row begins with what introduces it."""
    intro = ""
    for line in re.sub(r"```.*?```|<!--.*?-->|<[^>]+>", "", markdown, flags=re.S).splitlines():
        item = re.match(r"\s*(- |\d+\. |\|)", line)
        text = line.removeprefix(item[0]) if item else line
        parts = re.split(r"(?<=[.!?])[)*]* +(?=[A-Z(*\[`\"0-9])", text.strip())
        for part in parts:
            yield part, f"{intro} {part}" if item else part
        if line.strip() and not item:
            intro = parts[-1] if line.endswith(":") else ""


def shown(text):
    """What a reader sees of a text: the words of its links, not where they lead."""
    return re.sub(r"\]\([^)\s]+\)", "]", text)


class Text:
    """A notebook or the README: what it says (sentence, context, literals of its exercise), and what supports that."""

    def __init__(self, path):
        self.name = path.stem
        if path == README:
            prose = README.read_text(encoding="utf-8")
            tables = re.findall(r"<!-- results_table.*?-->\n\n((?:\|.*\n)+\nTrained on: .*\n)", prose)
            for table in tables:  # test_experiments.py makes them anew
                prose = prose.replace(table, "")
            self.says = [(*part, set()) for part in sentences(prose)]
            self.prints, self.settings = numbers("\n".join(tables)), set()
        else:
            self.says = [(alt, alt, set()) for alt in descriptions(path)]
            for cell in cells_of(path):
                if cell["cell_type"] == "markdown":  # an exercise speaks of what its check and solution set
                    own = set().union(*map(literals, re.findall(r"```python\n(.*?)```", source(cell), re.S)))
                    self.says += [(*part, own) for part in sentences(source(cell))]
            self.prints = numbers(outputs(path))
            self.settings = settings(path) | {
                line[key] for line in recorded(path.stem) for key in ("updates", "train_size")
            }
        # What has once been said with its source may be said again without.
        self.cites = [n for part, context, _ in self.says if SOURCE.search(context) for n in numbers(shown(part))]

    def supports(self, number, own=(), context=""):
        linked = [n for n in NOTEBOOKS if re.search(rf"\]\([\w/]*{n.name}|\({int(n.name[:2])}\)", context)]
        said = [*self.prints, *self.cites, *(n for notebook in linked for n in numbers(outputs(notebook)))]
        if any(number.is_said_by(other) for other in said):
            return True
        if number.percent and any(math.isclose(number.value, 100 * setting) for setting in {*self.settings, *own}):
            return True
        return (number.decimals > 0 or not number.percent) and number.value in {*self.settings, *own}

    def claims(self):
        """(number, its sentence, context and literals), without what has its source beside it or is in ARITHMETIC."""
        for part, context, own in self.says:
            for words in ARITHMETIC.get(self.name, {}):
                part = part.replace(words, "")
            if not SOURCE.search(context):
                yield from ((n, part, context, own) for n in numbers(shown(part)) if n.claims)


@pytest.mark.parametrize("path", [*NOTEBOOKS, README], ids=lambda path: path.stem)
def test_every_number_is_printed_set_or_cited(path):
    text = Text(path)
    unsupported = [(n.text, part) for n, part, context, own in text.claims() if not text.supports(n, own, context)]
    assert not unsupported, "\n".join(f"{number!r} in: {part}" for number, part in unsupported)


@pytest.mark.parametrize("path", [*NOTEBOOKS, README], ids=lambda path: path.stem)
def test_arithmetic_on_numbers_of_the_page(path):
    text = Text(path)
    prose = "\n".join(part for part, _, _ in text.says)
    own = set().union(*(own for _, _, own in text.says))
    for words, expression in ARITHMETIC.get(path.stem, {}).items():
        assert words in prose, f"{words!r} is not in the text any more"
        (number,) = numbers(words)
        assert number.is_rounded(computed(expression)), f"{words!r} is not {expression}"
        for part in numbers(expression):
            assert not part.claims or part.value == 100 or text.supports(part, own), (
                f"{part.text} of {words!r} is nowhere"
            )
