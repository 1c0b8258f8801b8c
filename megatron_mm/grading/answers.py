"""Comparing an answer with the reference."""


def exact_match(answer: str, reference: str) -> bool:
    """Equal up to white space at the ends and in runs."""
    return answer.split() == reference.split()
