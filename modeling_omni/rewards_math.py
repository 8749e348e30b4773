"""Equality of mathematical answers (the role of mathruler in paper section 3.2.3), safe on hostile strings.

Both answers are read by a small grammar (`rewards_grammar`), and equality is decided by value, under limits of length,
depth, work and size of numbers. Rational expressions are compared exactly with fractions, at several rational values of
their variables; what holds roots, logarithms or angles is computed by mpmath with many more digits than the strings can
write down. There is no clock, signal or process in it: the same strings cost the same work and score the same from any
thread, alone or beside others.
"""

import re
import threading
from fractions import Fraction
from math import comb, factorial, isqrt

from .rewards_grammar import FUNCTION_OF, FUNCTIONS, GOES_ON, GREEK, UNNAMED, NotMath, clean, parse
from .rewards_text import pair_up, plain_form, unwrap

MAX_LENGTH = 1000  # characters; longer answers are compared as text only
MAX_NODES = 20_000  # operations over all comparisons of one answer
MAX_BITS = 8192  # of a numerator or denominator
MAX_DIGITS = 300  # of irrational numbers

# ---------------------------------------------------------------------------------------------------- values

_local = threading.local()
_warm_lock = threading.Lock()
_warm = False


def mp_context(digits: int):
    """A context of mpmath for this thread, at this precision.

    mpmath shares its constants between threads without a lock; computed once at the highest precision that is ever
    asked for here, they are only read afterwards.
    """
    global _warm
    import mpmath
    from mpmath.libmp import libelefun

    if not hasattr(_local, "mp"):
        _local.mp = mpmath.MPContext()
    if not _warm:
        with _warm_lock:
            for constant in (libelefun.pi_fixed, libelefun.ln2_fixed, libelefun.ln10_fixed, libelefun.e_fixed):
                constant(16 * MAX_DIGITS)
            _warm = True
    _local.mp.dps = digits
    return _local.mp


class Values:
    """Evaluates trees at given values of their variables: exact fractions as long as possible, else mpmath numbers."""

    def __init__(self, digits: int):
        self.digits, self.left = min(digits, MAX_DIGITS), MAX_NODES
        self.log_base = None  # of a log without base: natural where None

    def mp(self):
        return mp_context(self.digits)

    def number(self, value):
        """A Fraction as an mpmath number; others as they are."""
        return self.mp().mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value

    def limited(self, value):
        if isinstance(value, Fraction):
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
                raise NotMath("number too large")
            return value
        if not self.mp().isfinite(value) or (value and abs(self.mp().mag(value)) > 700):
            raise NotMath("number too large")
        return value

    def of(self, tree, at: dict):
        self.left -= 1
        if self.left < 0:
            raise NotMath("too much work")
        kind = tree[0]
        if kind == "num":
            return tree[1]
        if kind == "var":
            return at[tree[1]]
        if kind == "const":
            return {"pi": self.mp().pi, "e": self.mp().e, "i": self.mp().mpc(0, 1)}[tree[1]] * self.mp().mpf(1)
        if kind == "neg":
            return -self.of(tree[1], at)
        if kind == "add":
            total = Fraction(0)
            for term in tree[1]:
                total = self.limited(self.plus(total, self.of(term, at)))
            return total
        if kind == "mul":
            product = Fraction(1)
            for factor, power in tree[1]:
                product = self.limited(self.times(product, self.of(factor, at), power))
            return product
        if kind == "pow":
            return self.limited(self.power(self.of(tree[1], at), self.of(tree[2], at)))
        if kind == "fn":
            return self.limited(self.function(tree[1], [self.of(one, at) for one in tree[2]]))
        raise NotMath(f"no value of a {kind}")

    def plus(self, a, b):
        return a + b if isinstance(a, Fraction) and isinstance(b, Fraction) else self.number(a) + self.number(b)

    def times(self, a, b, power: int):
        if power < 0 and b == 0:
            raise NotMath("division by zero")
        if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
            a, b = self.number(a), self.number(b)
        return a * b if power > 0 else a / b

    def power(self, base, exponent):
        if base == 0:
            if isinstance(exponent, Fraction) and exponent >= 0:
                return Fraction(exponent == 0)
            raise NotMath("power of zero")
        if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(exponent.numerator).bit_length() > 16 or size * abs(exponent.numerator) > MAX_BITS:
                raise NotMath("power too large")
            return base**exponent.numerator
        base, exponent = self.number(base), self.number(exponent)
        if abs(exponent) > 4000 or abs(self.mp().mag(base)) * abs(exponent) > 2000:
            raise NotMath("power too large")
        return self.mp().power(base, exponent)

    def function(self, name: str, values: list):
        value = values[0]
        if name in ("factorial", "binom"):
            if any(not isinstance(v, Fraction) or v.denominator > 1 or not 0 <= v <= 500 for v in values):
                raise NotMath("factorial too large")
            whole = [v.numerator for v in values]
            return Fraction(factorial(*whole) if name == "factorial" else comb(*whole))
        if name == "root":
            return self.root(value, values[1])
        if name == "abs":
            return abs(value)
        mp = self.mp()
        if name in ("floor", "ceil"):
            if not isinstance(value, Fraction):
                value = getattr(mp, name)(value)
                return Fraction(int(value)) if mp.isint(value) else value
            return Fraction(value.__floor__() if name == "floor" else value.__ceil__())
        x = self.number(value)
        if name in ("ln", "log", "lg"):
            if value == 0:
                raise NotMath("logarithm of zero")
            base = values[1] if len(values) > 1 else Fraction(10) if name == "lg" else self.log_base
            if name == "ln" or base is None:
                return mp.log(x)
            if base == 0 or base == 1:
                raise NotMath("base of a logarithm")
            return mp.log(x) / mp.log(self.number(base))
        # the size of an argument is bounded before: angles cost their digits, exponentials their value
        if x and mp.mag(x) > (11 if name in ("exp", "sinh", "cosh", "tanh") else 200):
            raise NotMath("argument too large")
        inverse = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec"}
        function = inverse.get(name, name)
        if function not in {*FUNCTIONS, *inverse.values()}:
            raise NotMath(f"function {name!r}")
        if function in ("cot", "csc", "asec", "acot") and x == 0:
            raise NotMath("pole")
        return getattr(mp, function)(x)

    def root(self, value, order):
        if not isinstance(order, Fraction) or order.denominator > 1 or not 2 <= order <= 100:
            raise NotMath("order of a root")
        order = order.numerator
        if isinstance(value, Fraction) and order == 2 and value >= 0:
            above, below = isqrt(value.numerator), isqrt(value.denominator)
            if above * above == value.numerator and below * below == value.denominator:
                return Fraction(above, below)
        x = self.number(value)
        if isinstance(value, Fraction) and value < 0 and order % 2:
            return -self.mp().root(-x, order)  # real, as school has it
        return self.mp().root(x, order)

    def near(self, a, b) -> bool:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b
        a, b = self.number(a), self.number(b)
        return abs(a - b) <= self.mp().mpf(10) ** (20 - self.digits) * max(1, abs(a), abs(b))


# ---------------------------------------------------------------------------------------------------- equality


def children(tree) -> list:
    """The trees directly inside a tree."""
    kind = tree[0]
    if kind == "mul":
        return [factor for factor, _ in tree[1]]
    if kind == "matrix":
        return [cell for row in tree[1] for cell in row]
    if kind in ("num", "var", "const", "inf"):
        return []
    if kind == "neg":
        return [tree[1]]
    if kind in ("pow", "pm"):
        return [tree[1], tree[2]]
    return tree[3] if kind == "tuple" else tree[2] if kind == "fn" else tree[1]


def walk(tree):
    yield tree
    for child in children(tree):
        yield from walk(child)


def points(names: list[str]) -> list[dict]:
    """Values for the variables: fixed fractions without common patterns, of both signs and several sizes."""
    above = (7919, -5167, 997, -613, 1487, 3571, -211, 9973, -31, 5501, 127, -2503, 89, 6361, -4409, 701)
    below = (401, 2003, 1009, 89, 3001, 97, 503, 9001, 67, 53, 1801, 7, 4001, 11, 23, 29)
    values = [Fraction(a, b) for a, b in zip(above, below)]
    return [{name: values[(k + 5 * i) % 16] + (k + 5 * i) // 16 for i, name in enumerate(names)} for k in range(16)]


def same_numbers(a, b, values: Values, up_to_factor: str = "") -> bool:
    """Whether two expressions have the same value wherever both are real (complex where they hold i).

    up_to_factor: "any" or "positive": the values may differ by one such factor (equations, inequalities).
    """
    names = sorted({t[1] for side in (a, b) for t in walk(side) if t[0] == "var"})
    imaginary = any(t == ("const", "i") for side in (a, b) for t in walk(side))
    valid, ratio = 0, None
    for at in points(names) if names else [{}]:
        try:
            one, two = values.of(a, at), values.of(b, at)
        except NotMath:
            if values.left < 0 or not names:
                raise
            continue
        if names and not imaginary and any(hasattr(v, "imag") and v.imag != 0 for v in (one, two)):
            continue
        if up_to_factor:
            if (one == 0) != (two == 0):
                return False
            if one == 0:
                continue
            ratio = ratio if ratio is not None else values.times(one, two, -1)
            if (up_to_factor == "positive" and ratio < 0) or not values.near(values.times(two, ratio, 1), one):
                return False
        elif not values.near(one, two):
            return False
        valid += 1
        if valid == 5:
            break
    return valid >= min(2, len(names) + 1)


def infinite(tree) -> int:
    """+1 or -1 for an infinity with that sign, 0 for anything else."""
    if tree[0] == "neg":
        return -infinite(tree[1])
    return int(tree[0] == "inf")


def expand(tree):
    """(tree with the upper signs, tree with the lower signs) of every plus-minus in it."""
    if not any(t[0] == "pm" for t in walk(tree)):
        return (tree,)

    def with_sign(t, sign: int):
        if t[0] == "pm":
            second = with_sign(t[2], sign)
            return ("add", [with_sign(t[1], sign), second if t[3] * sign > 0 else ("neg", second)])
        if t[0] == "mul":
            return ("mul", [(with_sign(factor, sign), power) for factor, power in t[1]])
        if t[0] in ("neg", "pow"):
            return (t[0], *(with_sign(one, sign) for one in t[1:]))
        if t[0] == "fn":
            return ("fn", t[1], [with_sign(one, sign) for one in t[2]])
        if t[0] in ("add", "list", "set"):
            return (t[0], [with_sign(one, sign) for one in t[1]])
        if t[0] == "rel":
            return ("rel", [with_sign(one, sign) for one in t[1]], t[2])
        if t[0] in ("num", "var", "const", "inf"):
            return t
        raise NotMath("plus-minus")

    return with_sign(tree, 1), with_sign(tree, -1)


def is_name(tree) -> bool:
    """A variable, or f(x), f(2), f(x, y) (which read as a product of two)."""
    if tree[0] == "mul":
        (name, _), *rest = tree[1]
        return (
            name[0] == "var" and len(rest) == 1 and rest[0][1] == 1 and rest[0][0][0] in ("var", "num", "neg", "tuple")
        )
    return tree[0] == "var"


def interval_of(relation):
    """x > 3, 1 <= x < 2 and the like as an interval, or None."""
    sides, signs = relation[1], relation[2]
    if any(sign[0] != signs[0][0] or sign[0] not in "<>" for sign in signs):
        return None
    if signs[0][0] == ">":
        sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    if len(sides) == 2 and sides[0][0] == "var":
        return ("tuple", "(", "]" if signs[0] == "<=" else ")", [("neg", ("inf",)), sides[1]])
    if len(sides) == 2 and sides[1][0] == "var":
        return ("tuple", "[" if signs[0] == "<=" else "(", ")", [sides[0], ("inf",)])
    if len(sides) == 3 and sides[1][0] == "var":
        brackets = "[" if signs[0] == "<=" else "(", "]" if signs[1] == "<=" else ")"
        return ("tuple", *brackets, [sides[0], sides[2]])
    return None


def same_items(a: list, b: list, values: Values, ordered: bool) -> bool:
    if len(a) != len(b) or len(a) > 50:
        return False
    if ordered:
        return all(same(one, two, values) for one, two in zip(a, b))
    return pair_up(a, b, lambda one, two: same(one, two, values))


def same_relations(a, b, values: Values) -> bool:
    if len(a[2]) != len(b[2]):
        return False
    if UNNAMED in (a[1][0], b[1][0]) and a[1][0][0] == b[1][0][0]:  # ">= 2" and "x >= 2"
        a = ("rel", [b[1][0], *a[1][1:]], a[2])
    flip = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
    steps = []
    for relation in (a, b):
        rows = []
        for left, sign, right in zip(relation[1], relation[2], relation[1][1:]):
            if sign[0] == ">":
                left, sign, right = right, flip[sign], left
            rows.append((sign, ("add", [left, ("neg", right)])))
        steps.append(rows)

    def alike(one, two) -> bool:
        how = "any" if one[0] in ("=", "!=") else "positive"
        return one[0] == two[0] and same_numbers(one[1], two[1], values, how)

    return pair_up(*steps, alike)


def same(a, b, values: Values) -> bool:
    """Whether two trees are the same answer."""
    if len(variants := expand(a)) > 1:
        a = ("list", list(variants))
    if len(variants := expand(b)) > 1:
        b = ("list", list(variants))
    kinds = {a[0], b[0]}
    if kinds == {"rel"}:
        return same_relations(a, b, values)
    if "rel" in kinds:
        relation, other = (a, b) if a[0] == "rel" else (b, a)
        if other[0] in ("tuple", "union"):
            interval = interval_of(relation)
            return interval is not None and same(interval, other, values)
        if any(sign != "=" for sign in relation[2]):
            return False
        if all(side == relation[1][0] for side in relation[1]):
            return False  # 5 = 5 says nothing
        sides = relation[1][1:] if is_name(relation[1][0]) else relation[1]
        sides = sides[:-1] if sides == relation[1] and is_name(sides[-1]) else sides
        return all(same(side, other, values) for side in sides)  # every side: no hedging
    if kinds == {"list", "union"}:  # x < -1 or x > 1
        parts = a[1] if a[0] == "list" else b[1]
        parts = [interval_of(part) if part[0] == "rel" else None for part in parts]
        other = b if a[0] == "list" else a
        return None not in parts and same_items(parts, other[1], values, ordered=False)
    if kinds <= {"list", "set"} and "list" in kinds:
        # solutions of an equation in any order, braces or not; "x = 1 or x = 2" is that list too
        return len(kinds) + len(a[1]) + len(b[1]) > 0 and same_items(a[1], b[1], values, ordered=False)
    if kinds == {"set"}:  # without order and without number
        if max(len(a[1]), len(b[1])) > 50:
            return False
        there = all(any(same(one, two, values) for two in b[1]) for one in a[1])
        return there and all(any(same(one, two, values) for two in a[1]) for one in b[1])
    if kinds == {"union"}:
        return same_items(a[1], b[1], values, ordered=False)
    if kinds == {"tuple"}:
        return a[1:3] == b[1:3] and same_items(a[3], b[3], values, ordered=True)
    if kinds == {"matrix"}:
        if [len(row) for row in a[1]] != [len(row) for row in b[1]]:
            return False
        return same_items([c for row in a[1] for c in row], [c for row in b[1] for c in row], values, ordered=True)
    if kinds & {"list", "set", "union", "tuple", "matrix"}:
        return False
    if infinite(a) or infinite(b):
        return infinite(a) == infinite(b)
    return same_numbers(a, b, values)


WORDS = re.compile(r"[^\W\d_][^\W\d_' -]+")
NAMES = {"pi", "inf", "infinity", "oo", *GREEK}
CLOCK = re.compile(r"([0-9]{1,2}(?::[0-9]{2}){1,2}) ?([ap])\.? ?m\.?", re.I)


def is_word(text: str) -> bool:
    """Whether a text is to be compared as a word; "xy" and "sinx" are not, "cat" is."""
    if text in NAMES or re.fullmatch("[xyz]+", text) or (FUNCTION_OF.fullmatch(text) and text[-1] in "xyz"):
        return False
    return WORDS.fullmatch(text) is not None


def math_equal(prediction: str, gold: str) -> bool:
    """Whether two answers are mathematically the same; strings of any length and content, never raises.

    Words are compared as words ("cat" is not "act"), an empty answer equals nothing, 50 % is both 50 and 0.5, a unit
    may be missing on one side but not differ.
    """
    if not prediction.strip() or not gold.strip():
        return False
    longest = max(len(prediction), len(gold))
    words = plain_form(prediction) if longest <= 100_000 else ""
    as_text = bool(words) and words == plain_form(gold)
    if longest <= MAX_LENGTH and bool(GOES_ON.search(prediction)) != bool(GOES_ON.search(gold)):
        as_text = False
    # case counts for variables, 2x and 2X, and not for words
    if longest > MAX_LENGTH or (as_text and (len(words) == 1 or "".join(prediction.split()) == "".join(gold.split()))):
        return as_text
    try:
        texts = [clean(prediction), clean(gold)]
        if any(map(is_word, map(unwrap, texts))):
            return as_text
        clocks = [CLOCK.fullmatch(text) for text in texts]
        if any(clocks):
            return all(clocks) and len({(clock[1], clock[2].lower()) for clock in clocks}) == 1
        (a, unit_a, percent_a), (b, unit_b, percent_b) = parse(texts[0]), parse(texts[1])
        if unit_a and unit_b and unit_a != unit_b:
            return False
        digits = 60 + sum(char.isdigit() for text in texts for char in text)
        hundredth = ("num", Fraction(1, 100))
        pairs = [(a, b)]
        if percent_a != percent_b:
            pairs.append(
                (("mul", [(a, 1), (hundredth, 1)]), b) if percent_a else (a, ("mul", [(b, 1), (hundredth, 1)]))
            )
        bare_log = any(t[0] == "fn" and t[1] == "log" and len(t[2]) == 1 for tree in (a, b) for t in walk(tree))
        for base in (None, Fraction(10)) if bare_log else (None,):
            values = Values(digits)
            values.log_base = base
            if any(_same(one, two, values) for one, two in pairs):
                return True
        return False
    except (NotMath, ArithmeticError, ValueError, TypeError, RecursionError, MemoryError):
        return as_text


def _same(a, b, values: Values) -> bool:
    try:
        return same(a, b, values)
    except (NotMath, ArithmeticError):
        return False


__all__ = ["math_equal"]
