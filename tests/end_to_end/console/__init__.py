ECHO = "echo"
SLOW = "slow-echo"

ADMIN_KEY = "tk-" + "TheKeyOfTheConsolesTests" * 2
ADMIN_PASSWORD = "seven trunks under the sea"  # noqa: S105 - nobody's
MEMBERS_PASSWORD = "one strand of the seven"  # noqa: S105
