"""A small grammar of mathematics as answers write it (for `rewards_math`).

No general parser (sympy's runs Python code and hangs on `9^9^9^9`) ever sees an answer. What answers look like is read
into a tree of tuples under limits of length and depth; everything else raises `NotMath`. A tree is one of

    ("num", Fraction)  ("var", name)  ("const", "pi" | "e" | "i")  ("inf",)
    ("add", [trees])  ("mul", [(tree, +1 or -1)])  ("neg", t)  ("pow", base, exponent)  ("fn", name, [trees])
    ("pm", a, b, sign)  ("tuple", opening, closing, [trees])  ("set" | "list" | "union", [trees])
    ("matrix", [rows])  ("rel", [trees], [operators])
"""

import re
import unicodedata
from fractions import Fraction

from .rewards_text import unwrap, visible

MAX_DEPTH = 40  # brackets, exponents and signs inside one another
UNNAMED = ("var", "?")  # what ">= 2" is about


class NotMath(Exception):
    """A string the grammar does not cover, or one beyond the limits."""


# ---------------------------------------------------------------------------------------------------- tokens

UNICODE_MATH = dict(zip("×·⋅÷∕⁄≈", "***///=")) | {"∛": r"\sqrt[3]"}
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
)
GREEK = (GREEK + "Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega").split()
UNICODE_NAMES = "pi sqrt infty le ge ne pm cup in emptyset degree".split() + GREEK
UNICODE_MATH |= {
    char: rf"\{name} " for char, name in zip("π√∞≤≥≠±∪∈∅°αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΣΦΨΩ", UNICODE_NAMES, strict=True)
}
GREEK = {*GREEK, "ell", "hbar"}
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"))
SPACING = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|,|;|:|!|~)(?![a-zA-Z])|\\q?quad(?![a-zA-Z])|~")
ACCENTS = set("vec hat mathbf mathit mathbb mathcal mathsf bm boldsymbol operatorname mathrm".split())
OPERATORS = """
cdot * times * ast * div / le <= leq <= leqslant <= ge >= geq >= geqslant >= lt < gt > ne != neq != approx = colon :
lbrace \\{ rbrace \\} vert | lvert | rvert | mid | lbrack [ rbrack ] langle ( rangle ) newrow newrow
""".split()
OPERATORS = dict(zip(OPERATORS[::2], OPERATORS[1::2]))
TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4}(?![0-9a-zA-Z{]))?)"
    r"|\\(?:text(?:bf|it|rm|normal)?|mathrm|mbox|operatorname)\s*\{(?P<text>[^{}\\]*)\}"
    r"|\\(?P<command>[a-zA-Z]+)"
    r"|(?P<letters>[^\W\d_]+)"
    r"|(?P<sign>\\[{}%$]|\*\*|<=|>=|!=|==|[-+*/^_(){}\[\]|,;:=<>!%'&])"
)
FUNCTIONS = "sin cos tan cot sec csc sinh cosh tanh ln lg exp log abs floor ceil arcsin arccos arctan asin acos atan"
FUNCTIONS = set(FUNCTIONS.split())
FUNCTION_OF = re.compile(rf"({'|'.join(sorted(FUNCTIONS))})([a-zA-Z])", re.I)  # sinx
GOES_ON = re.compile(r"\.[0-9]+ ?(?:\.{3}|…)\W*$")  # 3.14..., which is not 3.14
REPEATS = re.compile(r"([0-9]*\.[0-9]*?)(?:([0-9])\2\2+|([0-9]{2,6}?)\3+) ?\.{3}")  # 0.1666...
REALS = re.compile(r"\\mathbb\s*(?:R\b|\{\s*R\s*\})(?!\s*[\^_])|all real(?:s| numbers)")
MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

# Units as answers write them: first the form that is compared, then its other spellings.
UNITS = """
cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|m meter metre|in inch inches|ft foot feet|
yd yard|mi mile|g gram|kg kilogram|mg milligram|lb pound|oz ounce|s sec second|ms millisecond|min minute|h hr hour|
day|week|month|year yr|L l liter litre|ml mL milliliter millilitre|deg degree|rad radian|dollar usd|cent|euro|unit|
mph|kmh kph|N newton|J joule|W watt|V volt|A amp ampere|Hz hertz|K kelvin|Pa pascal|kPa|kW|kJ|MHz|kHz|mol mole|
point|people person|item|gallon gal|quart|pint|cup|acre|hectare|student|apple|ball|book|car|time|way|square sq|cubic cu|
per
"""
UNIT_NAMES = {name: row.split()[0] for row in UNITS.replace("\n", "").split("|") for name in row.split()}
SPACED_UNITS = {"m", "g", "s", "h", "L", "l", "N", "J", "W", "V", "A", "K"}  # "5 m" is metres, "5m" is five times m


def unit_of(word: str) -> str | None:
    """The compared form of a unit word."""
    lower = word if word in UNIT_NAMES else word.lower()
    if lower not in UNIT_NAMES and lower.endswith("s") and len(lower) > 2:
        lower = lower[:-1]
    return UNIT_NAMES.get(lower) if len(lower) > 1 or word == lower else None


def tokens_of(text: str) -> list[tuple[str, str, bool]]:
    """[(kind, text, whether a space stands before)]; kind is number, text, command, letters or sign."""
    tokens, position, spaced = [], 0, False
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise NotMath(f"unexpected {text[position]!r}")
        position = match.end()
        kind, value = match.lastgroup, match.group(match.lastgroup)
        if kind == "space":
            spaced = True
            continue
        if kind == "command" and value in OPERATORS:
            kind, value = "sign", OPERATORS[value]
        elif kind == "command" and value in ACCENTS:
            continue
        elif kind == "text" and (value.strip() in FUNCTIONS or len(value.strip()) == 1):
            kind, value = "letters", value.strip()
        elif value in ("\\%", "**", "=="):
            value = {"\\%": "%", "**": "^", "==": "="}[value]
        tokens.append((kind, value, spaced))
        spaced = False
    return tokens


def clean(text: str) -> str:
    """Unicode and LaTeX variants to one writing, thousands separators out; `text` up to MAX_LENGTH."""
    pieces = []
    for char in text:
        if char in SUPERSCRIPTS:
            # a run of superscripts is one exponent
            if pieces and pieces[-1].startswith("^{"):
                pieces[-1] = pieces[-1][:-1] + SUPERSCRIPTS[char] + "}"
            else:
                pieces.append("^{" + SUPERSCRIPTS[char] + "}")
        elif "⁄" in (parts := unicodedata.normalize("NFKC", char)) and len(parts) > 1:
            pieces.append(f" {parts} ")
        else:
            pieces.append(char)
    text = visible("".join(pieces).replace("ℝ", "\\mathbb{R}"))
    if repeats := REPEATS.fullmatch(text.strip(" $")):
        text = f"{repeats[1]}\\overline{{{repeats[2] or repeats[3]}}}"
    if GOES_ON.search(text):
        raise NotMath("digits left out")
    text = REALS.sub(r"(-\\infty,\\infty)", re.sub(r"(?<=[0-9]) ?[xX] ?(?=10(?:\^|\*\*))", "*", text))
    text = "".join(UNICODE_MATH.get(char, char) for char in text)
    text = text.replace("\\\\", "\\newrow ").replace("{,}", ",")
    text = re.sub(r"\\?\$|\\[()]", "", text)
    text = re.sub(r"(?<=[0-9])\\[,! ](?=[0-9]{3}(?![0-9]))", "", text.replace("\\!", ""))
    text = SPACING.sub(" ", text).replace("\\ ", " ").replace("\\[", "").replace("\\]", "")
    text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", text)
    text = re.sub(r"\^\s*\{?\s*\\(?:circ|degree)\b\s*\}?|\\degree\b", r"\\degree ", text)
    text = re.sub(r"^(?:\\(?:approx|sim(?:eq)?)(?![a-z])|[€£¥=\s])+|(?:\\newrow |[.,;。\s])+$", "", text)
    if text.startswith(("\\boxed{", "\\fbox{", "\\mathbf{", "\\textbf{", "**", "\\text{", "\\mathrm{")):
        text = unwrap(text).strip("*")
    if re.fullmatch(r"[0-9]{1,3}( [0-9]{3})+", text):
        return text.replace(" ", "")
    depth, out, position = 0, [], 0
    for match in re.finditer(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])|[(\[{]|[)\]}]", text):
        mark = match.group()
        depth += (mark in "([{") - (mark in ")]}")
        if depth == 0 and mark[0].isdigit():
            out += [text[position : match.start()], mark.replace(",", "")]
            position = match.end()
    return "".join(out) + text[position:]


# ---------------------------------------------------------------------------------------------------- grammar


class Parser:
    """Recursive descent over `tokens_of`; every method reads one level of the grammar and returns a tree."""

    def __init__(self, tokens: list):
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    def peek(self, ahead: int = 0) -> tuple[str, str, bool]:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ("end", "", False)

    def take(self, *signs: str) -> str | None:
        """The next token's text if it is one of these signs, else None."""
        kind, value, _ = self.peek()
        if kind == "sign" and value in signs:
            self.at += 1
            return value
        return None

    def need(self, sign: str) -> None:
        if not self.take(sign):
            raise NotMath(f"expected {sign!r}")

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMath("too deep")

    def minus(self) -> bool:
        """Takes any number of signs: whether they come to a minus."""
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        return negative

    def answer(self):
        """Items apart by commas, semicolons, "and", "or"; each a relation."""
        items = [self.relation()]
        while self.at < len(self.tokens):
            comma = self.take(",", ";")
            kind, value, _ = self.peek()
            if kind in ("text", "letters") and value.strip().lower() in ("and", "or"):
                self.at += 1
            elif not comma:
                raise NotMath(f"unexpected {value!r}")
            items.append(self.relation())
        return items[0] if len(items) == 1 else ("list", items)

    def relation(self):
        # ">= 2" is about something without a name
        unnamed = self.peek()[0] == "sign" and self.peek()[1] in ("<", ">", "<=", ">=", "!=")
        sides, signs = [UNNAMED if unnamed else self.union()], []
        while sign := self.take("=", "<", ">", "<=", ">=", "!="):
            signs.append(sign)
            sides.append(self.union())
        if not signs and self.peek()[:2] == ("command", "in") and sides[0][0] == "var":
            self.at += 1
            return self.union()
        return ("rel", sides, signs) if signs else sides[0]

    def union(self):
        parts = [self.ratio()]
        while self.peek()[:2] in (("command", "cup"), ("letters", "U")):
            self.at += 1
            parts.append(self.ratio())
        return ("union", parts) if len(parts) > 1 else parts[0]

    def ratio(self):
        left = self.sum()
        if self.take(":"):
            return ("mul", [(left, 1), (self.sum(), -1)])
        if self.peek()[:2] == ("command", "choose"):
            self.at += 1
            return ("fn", "binom", [left, self.sum()])
        return left

    def sum(self):
        self.deeper()
        terms = [self.signed()]
        while True:
            if sign := self.take("+", "-"):
                term = self.signed()
                terms.append(("neg", term) if sign == "-" else term)
            elif self.peek()[:2] in (("command", "pm"), ("command", "mp")):
                sign = 1 if self.peek()[1] == "pm" else -1
                self.at += 1
                terms = [("pm", ("add", terms), self.signed(), sign)]
            else:
                break
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", terms)

    def signed(self):
        """A term behind any number of signs."""
        negative = self.minus()
        if self.peek()[:2] in (("command", "pm"), ("command", "mp")):
            sign = 1 if self.peek()[1] == "pm" else -1
            self.at += 1
            return ("pm", ("num", Fraction(0)), self.term(), -sign if negative else sign)
        term = self.term()
        return ("neg", term) if negative else term

    def term(self):
        factors = [(self.factor(), 1)]
        while True:
            if sign := self.take("*", "/"):
                negative, factor = self.minus(), self.factor()
                factors.append((("neg", factor) if negative else factor, 1 if sign == "*" else -1))
            elif self.starts_factor():
                factors.append((self.factor(), 1))
            else:
                return factors[0][0] if len(factors) == 1 else ("mul", factors)

    def starts_factor(self) -> bool:
        """Whether the next token continues a product without a sign, as in 2x or (a)(b); two numbers never do."""
        kind, value, _ = self.peek()
        if kind == "sign":
            return value in ("(", "[", "{") or (value == "|" and not self.bars)
        if kind == "letters":
            return value.lower() not in ("and", "or", "u")
        return kind == "command" and value not in "cup in pm mp end degree choose rfloor rceil".split()

    def factor(self):
        base = self.primary()
        while True:
            if self.take("^"):
                base = ("pow", base, self.exponent())
            elif self.peek()[:2] == ("sign", "!") and self.peek(1)[:2] != ("sign", "!"):
                self.at += 1
                base = ("fn", "factorial", [base])
                if self.peek()[:2] == ("sign", "!"):
                    raise NotMath("double factorial")
            elif self.peek()[:2] == ("command", "degree"):
                self.at += 1
                base = ("mul", [(base, 1), (("const", "pi"), 1), (("num", Fraction(180)), -1)])
            else:
                return base

    def exponent(self):
        """An exponent, right-associative: 2^3^2 is 2^9."""
        self.deeper()
        negative = self.minus()
        tree = self.primary()
        if self.take("^"):
            tree = ("pow", tree, self.exponent())
        self.depth -= 1
        return ("neg", tree) if negative else tree

    def group(self, opening: str):
        """Behind an opening bracket: a group, or a tuple or interval of several items."""
        saved, self.bars = self.bars, 0
        items = [self.relation()]
        while self.take(",", ";"):
            items.append(self.relation())
        self.bars = saved
        closing = self.take(")", "]", "}", "\\}")
        wanted = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}[opening]
        if closing is None or (closing != wanted and (opening not in "([" or closing not in ")]")):
            raise NotMath("brackets do not match")
        if opening == "\\{" or (opening == "{" and len(items) > 1):
            return ("set", items)
        if len(items) == 1 and closing == wanted:
            return items[0]
        return ("tuple", opening, closing, items)

    def argument(self, split_digits: bool = False):
        """A LaTeX argument: a group, or one token (of \\frac12 one digit)."""
        kind, value, spaced = self.peek()
        if split_digits and kind in ("number", "letters") and len(value) > 1:
            self.tokens[self.at] = (kind, value[1:], False)
            return self.number(value[0]) if kind == "number" else ("var", value[0])
        return self.primary()

    def number(self, text: str):
        mantissa, _, power = text.lower().partition("e")
        if len(mantissa) > 400 or abs(int(power or 0)) > 400:
            raise NotMath("number too long")
        return ("num", Fraction(mantissa.rstrip(".")) * Fraction(10) ** int(power or 0))

    def primary(self):
        self.deeper()
        tree = self.atom()
        self.depth -= 1
        return tree

    def atom(self):
        kind, value, _ = self.peek()
        self.at += 1
        if kind == "number":
            return self.after_number(value)
        if kind == "letters":
            return self.name(value)
        if kind == "command":
            return self.command(value)
        if kind == "sign" and value in ("(", "[", "{", "\\{"):
            if value == "\\{" and self.take("\\}"):
                return ("set", [])
            return self.group(value)
        if kind == "sign" and value == "|" and not self.bars:
            self.bars += 1
            tree = self.sum()
            self.need("|")
            self.bars -= 1
            return ("fn", "abs", [tree])
        raise NotMath(f"unexpected {value!r}")

    def after_number(self, text: str):
        """A number with what belongs to it: repeating decimals, bases, mixed fractions."""
        number = self.number(text)
        kind, value, spaced = self.peek()
        if kind == "command" and value in ("overline", "bar", "dot") and "." in text:
            self.at += 1
            self.take("{")
            digits = self.peek()[1]
            if not digits.isdigit() or len(digits) > 50:
                raise NotMath("repeating decimal")
            self.at += 1
            self.take("}")
            shift = len(text.partition(".")[2])
            return ("num", number[1] + Fraction(int(digits), 10**shift * (10 ** len(digits) - 1)))
        if self.take("_"):
            base = self.argument()
            if base[0] != "num" or not 2 <= base[1] <= 36 or not text.isdigit():
                raise NotMath("subscript of a number")
            try:
                return ("num", Fraction(int(text, int(base[1]))))
            except ValueError as error:
                raise NotMath("digit beyond the base") from error
        if text.isdigit() and kind == "number" and spaced and value.isdigit():
            slash, below = self.peek(1), self.peek(2)
            if slash[:2] == ("sign", "/") and below[0] == "number" and below[1].isdigit() and int(below[1][:99]):
                self.at += 3
                return ("num", number[1] + Fraction(int(value[:99]), int(below[1][:99])))
        if text.isdigit() and kind == "command" and value == "frac":
            self.at += 1
            part = self.command("frac")
            above, below = part[1][0][0], part[1][1][0]
            if above[0] == below[0] == "num" and below[1]:
                return ("num", number[1] + above[1] / below[1])
            return ("mul", [(number, 1), (part, 1)])
        return number

    def name(self, word: str):
        """Letters: a function, a constant, or single-letter variables side by side."""
        lower = word.lower()
        if lower == "sqrt" or lower in FUNCTIONS:
            return self.function(lower)
        if lower in ("pi", "inf", "infinity", "oo"):
            return ("const", "pi") if lower == "pi" else ("inf",)
        if word in GREEK:
            return self.subscripted(word)
        if lower in MULTIPLIERS:
            return ("num", Fraction(MULTIPLIERS[lower]))
        if match := FUNCTION_OF.fullmatch(word):
            self.at -= 1
            self.tokens[self.at] = ("letters", match[2], False)
            return self.function(match[1].lower())
        if len(word) > 3:
            raise NotMath(f"word {word!r}")
        if len(word) > 1:
            self.at -= 1
            self.tokens[self.at] = ("letters", word[1:], False)
        return ("const", word[0]) if word[0] in "ei" and not self.subscript_next() else self.subscripted(word[0])

    def subscript_next(self) -> bool:
        return self.peek()[:2] == ("sign", "_")

    def subscripted(self, name: str):
        if not self.take("_"):
            return ("var", name)
        if not self.take("{"):
            value = self.peek()[1]
            self.at += 1
            return ("var", f"{name}_{value}")
        parts = []
        while not self.take("}"):
            kind, value, _ = self.peek()
            if kind == "end":
                raise NotMath("subscript without end")
            self.at += 1
            parts.append(value)
        return ("var", f"{name}_{' '.join(parts)}")

    def command(self, name: str):
        if name == "frac":
            above = self.argument(split_digits=True)
            return ("mul", [(above, 1), (self.argument(split_digits=True), -1)])
        if name in ("binom", "dbinom", "tbinom"):
            above = self.argument(split_digits=True)
            return ("fn", "binom", [above, self.argument(split_digits=True)])
        if name == "sqrt" or name in FUNCTIONS:
            return self.function(name)
        if name in ("pi", "infty"):
            return ("const", "pi") if name == "pi" else ("inf",)
        if name in ("emptyset", "varnothing"):
            return ("set", [])
        if name in ("lfloor", "lceil"):
            tree = self.sum()
            if self.peek()[1] != {"lfloor": "rfloor", "lceil": "rceil"}[name]:
                raise NotMath("floor without end")
            self.at += 1
            return ("fn", {"lfloor": "floor", "lceil": "ceil"}[name], [tree])
        if name.removeprefix("var") in GREEK:
            return self.subscripted(name.removeprefix("var"))
        if name == "begin":
            return self.matrix()
        raise NotMath(f"command {name!r}")

    def matrix(self):
        self.need("{")
        kind = self.peek()[1]
        self.at += 1
        self.need("}")
        if kind not in ("matrix", "pmatrix", "bmatrix", "vmatrix", "array", "smallmatrix"):
            raise NotMath(f"environment {kind!r}")
        rows = [[]]
        while True:
            rows[-1].append(self.sum())
            if self.take("newrow"):
                if self.peek()[:2] != ("command", "end"):
                    rows.append([])
                    continue
            elif self.take("&"):
                continue
            if self.peek()[:2] != ("command", "end"):
                raise NotMath("matrix without end")
            self.at += 4
            if self.at > len(self.tokens):
                raise NotMath("matrix without end")
            return ("matrix", rows)

    def function(self, name: str):
        order, power = ("num", Fraction(2)), None
        if name == "sqrt" and self.take("["):
            order = self.sum()
            self.need("]")
        base = self.argument() if name == "log" and self.take("_") else None
        if name != "sqrt" and self.take("^"):
            power = self.exponent()
        if self.peek()[:2] in (("sign", "("), ("sign", "{"), ("sign", "[")) or name == "sqrt":
            inner = self.primary()
        else:  # sin 2x: the product up to the next function
            factors = [(self.factor(), 1)]
            while self.starts_factor() and self.peek()[1].lower() not in FUNCTIONS:
                factors.append((self.factor(), 1))
            inner = factors[0][0] if len(factors) == 1 else ("mul", factors)
        if name == "sqrt":
            return ("fn", "root", [inner, order])
        if power == ("neg", ("num", Fraction(1))):
            return ("fn", "arc" + name, [inner])
        name = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}.get(name, name)
        tree = ("fn", name, [inner] if base is None else [inner, base])
        return tree if power is None else ("pow", tree, power)


def parse(text: str) -> tuple[tuple, str, bool]:
    """A cleaned answer -> (tree, unit or "", whether a percent sign stood behind it). Raises NotMath."""
    tokens = tokens_of(text)
    percent, unit = False, []
    # degrees at the end are a unit, except of an angle: sin 30 degrees
    ends = ("%", "percent")
    if not any(value in FUNCTIONS for _, value, _ in tokens):
        ends += ("degree", "degrees")
    while len(tokens) > 1 and tokens[-1][1].strip().lower() in ends:
        percent |= tokens.pop()[1].strip().lower() in ("%", "percent")
    start = next((i for i in range(1, len(tokens)) if starts_unit(tokens, i)), None)
    if start is not None:
        for kind, value, _ in tokens[start:]:
            words = value.split() if kind in ("text", "letters") else [value]
            unit += [unit_of(word) or word.lower() for word in words if word not in ("{", "}")]
        tokens = tokens[:start]
    parser = Parser(tokens)
    tree = parser.answer()
    return tree, " ".join(unit).replace("square cm", "cm ^ 2").replace("square m", "m ^ 2"), percent


def starts_unit(tokens: list, start: int) -> bool:
    """Whether everything from this token on is a unit, as in `5 cm^2`, `5 \\text{ apples}`, `60 km/h`."""
    for place, (kind, value, spaced) in enumerate(tokens[start:]):
        words = value.split()
        if kind == "text":
            if not words or any(word.lower() in ("and", "or", *MULTIPLIERS) for word in words):
                return False
        elif kind == "letters":
            single = len(value) == 1 and not (place or (spaced and value in SPACED_UNITS))
            if single or unit_of(value) is None:
                return False
        elif place == 0 or value not in ("^", "2", "3", "{", "}", "/"):
            return False
    return tokens[start - 1][1] not in ("^", "_", "*", "+", "-", "/", "=", "(", "[", "{", ",", "cup", "in")
