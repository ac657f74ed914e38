"""A promise that was broken."""


class Violation(AssertionError):
    """`promise`: which one, in a word or two; by it a failure is told from others when it is shrunk."""

    def __init__(self, promise: str, text: str) -> None:
        super().__init__(f"{promise}: {text}")
        self.promise = promise
