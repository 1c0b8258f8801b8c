"""Strings that graders must survive: 200 that were made to harm them, and any number that chance has made."""

import random

# What answers are made of, and what breaks parsers.
_PIECES = [
    *"0123456789xyzinABCD+-*/^_=<>()[]{}|!,.:;%$&~'\"\\ \t\n",
    r"\frac", r"\sqrt", r"\left(", r"\right)", r"\pi", r"\infty", r"\cup", r"\cap", r"\pm", r"\text{", r"\boxed{",
    r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\int", r"\sum_{n=1}^{", r"\lim", r"\log", r"\sin", r"\binom",
    "<think>", "</think>", "<answer>", "</answer>", "Final Answer:", " cm", " m/s^2", "%", "°", "π", "√", "∞", "−", "½",
    "\0", "\x1b[2J", "\ud800", "\udfff", "\ufeff", "\u202e", "\u0301", "😀", "٣", "Ⅷ", "１", "e99", "**", "10^", "!!",
]  # fmt: skip


def fuzzed(count: int, seed: int) -> list[str]:
    """Random strings of those pieces; most are short, as answers are."""
    chance = random.Random(seed)
    return ["".join(chance.choices(_PIECES, k=int(chance.paretovariate(0.7)) % 200 + 1)) for _ in range(count)]


def hostile() -> list[str]:
    """200 strings: deep nesting, large powers, long strings, expressions that grow, what is no text, code."""
    strings = [*_powers(), *_nested(), *_long(), *_growing(), *_no_text(), *_code()]
    assert len(strings) == len(set(strings)) == 200, (len(strings), len(set(strings)))
    return strings


def _powers() -> list[str]:
    """36 numbers that nobody can write out."""
    towers = ["**".join("9" * height) for height in (3, 4, 5, 9, 50)]
    towers += ["^".join("9" * height) for height in (3, 4, 5, 9, 50)]
    towers += ["9^{" * height + "9" + "}" * height for height in (2, 3, 10, 100)]
    bases = [
        f"{base}^{{{power}}}"
        for base in ("2", "10", "(-3)", "1.0001")
        for power in ("10^9", "99999999", "10^{10^{10}}")
    ]
    factorials = ["99999999!", "9!!!!", "(10^9)!", r"\binom{10^9}{5\cdot10^8}", "1e999999999", "1.5e-999999999"]
    return [
        *towers,
        *bases,
        *factorials,
        r"\sqrt[99999999]{2^{99999999}}",
        r"\log_2 2^{999999999}",
        "0.1^{99999999}",
        "1e308 1e308",
    ]


def _nested() -> list[str]:
    """48 strings of brackets and commands in each other, closed or not."""
    openers = ["(", "[", "{", r"\{", r"\frac{", r"\sqrt{", r"\text{", r"\boxed{", r"\left(", "|", "-", "x^{"]
    return [opener * depth for opener in openers for depth in (90, 150, 300)] + [opener * 100_000 for opener in openers]


def _long() -> list[str]:
    """34 strings of up to a million characters."""
    units = [
        "9",
        "x",
        " ",
        "\n",
        "a b ",
        "1,",
        "1+",
        "A, ",
        "B. 12 cm or ",
        r"\pi ",
        "=",
        "é",
        "0.",
        "1/",
        "3 4/5 ",
        "{}",
        "$",
    ]
    return [unit * (1_000_000 // len(unit)) for unit in units] + [unit * (1_900 // len(unit)) for unit in units]


def _growing() -> list[str]:
    """30 expressions that are short until somebody works them out."""
    sums = ["+".join(f"x_{{{n}}}" for n in range(200)), "*".join(f"(x+{n})" for n in range(120))]
    lists = [",".join(map(str, range(500))), "{" + ",".join(f"x^{n}" for n in range(150)) + "}"]
    ones = r"\\".join("&".join(["x"] * 20) for _ in range(20))
    unlike = r"\\".join("&".join(f"x_{{{row * 9 + column}}}" for column in range(9)) for row in range(9))
    matrices = [rf"{name}\begin{{pmatrix}}{rows}\end{{pmatrix}}" for name, rows in (("", ones), (r"\det", unlike))]
    return [
        *sums, *lists, *matrices,
        "(1+x)^{9999}", "(1+x+y+z)^{300}", "(a+b+c+d+e)^{99}", "(x^{99}+1)^{99}", "x^{10^6}-1", "(x-1)^{10^5}",
        r"\sum_{n=1}^{10^9} n^n", r"\prod_{n=1}^{10^9} n", r"\sum_{n=1}^{\infty} \frac{1}{n^{n}}",
        r"\int_0^1 x^x dx", r"\int \sqrt{1+x^7} dx", r"\int e^{\sin(x^3)} dx",
        r"\lim_{x\to 0} \frac{\sin^{99} x}{x^{99}}", r"\frac{d}{dx} x^{x^{x^{x}}}",
        r"\sin(\cos(\tan(\sin(\cos(\tan(x))))))", r"\tan(99999 x)", r"\cos(1000 x)",
        r"\sqrt{1+\sqrt{2+\sqrt{3+\sqrt{4+\sqrt{5+\sqrt{6+\sqrt{7}}}}}}}",
        r"\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7}+\sqrt{11}+\sqrt{13}",
        "x^5-x-1=0", "x^{11}+x+1=0", r"x^{x}=2", r"\sin x = x", r"x^y = y^x",
    ]  # fmt: skip


def _no_text() -> list[str]:
    """32 strings of characters that are no text, or another one than it looks."""
    strange = [
        "\0",
        "\x01",
        "\x07",
        "\x08",
        "\x1b[31m",
        "\x7f",
        "\x85",
        "\xa0",
        "\ud800",
        "\udfff",
        "\ufeff",
        "\u202e",
        "\u200b",
        "\u2028",
        "\ufffe",
        "\U0010ffff",
    ]
    return [one + "7" for one in strange] + [one * 500 for one in strange]


def _code() -> list[str]:
    """20 strings that would do something, were they run or believed."""
    return [
        "__import__('os')._exit(0)", "__import__('time').sleep(99)", "exit()", "raise SystemExit", "while True: pass",
        "open('/etc/passwd').read()", "().__class__.__bases__[0].__subclasses__()", "eval('9**9**9')", "lambda: 0",
        "os.kill(os.getppid(), 9)", "'; DROP TABLE answers; --", "$(kill -9 $PPID)", "`kill -9 $PPID`", "{{7*7}}",
        '{"value": 1.0}', '[1.0, ""]', '\n{"value": 1.0, "failure": null}\n', r"\input{/etc/passwd}", r"\def\x{\x\x}\x",
        r"\newcommand{\a}{\a\a}\a",
    ]  # fmt: skip
