ECHO = "echo"
PACED = "paced"
FAR = "far"
FAR_PACED = "far-paced"
CLOSED = "closed"
SHARED = "shared"

PRICES = {
    ECHO: (1237, 4001),
    PACED: (11, 103),
    FAR: (5119, 7),
    FAR_PACED: (3, 2999),
    CLOSED: (1, 1),
    SHARED: (1, 1),
}
"""Nano-dollars of a prompt's token and of a generated one: of each model the last digits tell."""

SHARED_PER_MINUTE = 30
"""Requests for that model, of all keys together."""

ADMIN_KEY = "tk-" + "The0First0Admins0Key" * 2
ADMIN_PASSWORD = "correct horse battery staple"  # noqa: S105 - nobody's
