"""The record of a promotion decision: the keys that `promotion.json` has had since the first runs."""

import json

from pipelines.promotion.decision import Decision
from pipelines.promotion.gate import Check


def test_the_record_has_each_message_under_the_key_words():
    checks = (Check("speedup", False, "it is 1.1 times as fast"), Check("champion", None, "there is none"))
    decision = Decision("gate", "tiny", "3", checks, "2", {"speedup": "1.1"})
    assert json.loads(json.dumps(decision.to_dict())) == {
        "mode": "gate",
        "model": "tiny",
        "version": "3",
        "champion": "2",
        "checks": [
            {"name": "speedup", "passed": False, "words": "it is 1.1 times as fast"},
            {"name": "champion", "passed": None, "words": "there is none"},
        ],
        "promoted": False,
        "outcome": "refused",
        "words": "version 3 of tiny is kept and not promoted, version 2 stays the champion: "
        "it is 1.1 times as fast",
    }
