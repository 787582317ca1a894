"""The log of conversations: bounded in size and time, joined with what was reported on the answers."""

from __future__ import annotations

from datetime import timedelta
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update

from adapters.conversations import MAX_CONVERSATION_BYTES, Conversation, ConversationLog, prompt_sha256
from adapters.database import Database
from adapters.experiments import ExperimentService
from adapters.records import Actor, Binding, Exposure, Feedback
from adapters.tables import ConversationRow, utc_now

QUESTION = [{"role": "user", "content": "q"}]
NAMES = count()


@pytest.fixture
def log(database: Database) -> ConversationLog:
    """An empty log."""
    return ConversationLog(database)


def _keep(log: ConversationLog, text: str = "a", *, alias: str = "legal", age_days: float = 0) -> str:
    """One kept conversation, as old as said."""
    name = f"chatcmpl-{next(NAMES)}"
    binding = Binding(alias, "alias", "d" * 64, 2)
    ExperimentService(log.database).record_exposure(
        Exposure(name, binding, "u", "user", 5, 7, 1.5, 9.5, "stop", None),
    )
    assert log.keep(Conversation(name, QUESTION, [], [{"role": "assistant", "content": text}]))
    with log.database.write() as session:
        moment = utc_now() - timedelta(days=age_days)
        session.execute(update(ConversationRow).where(ConversationRow.response_id == name).values(kept_at=moment))
    return name


def _kept(log: ConversationLog) -> list[str]:
    with log.database.read() as session:
        return list(session.scalars(select(ConversationRow.response_id).order_by(ConversationRow.kept_at)))


def test_delete_old_deletes_what_is_past_its_days_when_called(log: ConversationLog) -> None:
    """A day more is too old, a day less is not; the exposures stay, and so does the feedback on them."""
    old, young = _keep(log, age_days=31), _keep(log, age_days=29)
    ExperimentService(log.database).record_feedback(Feedback(old, "helpful", 1.0))
    assert 1 == log.delete_old(days=30, max_bytes=1 << 30)
    assert [young] == _kept(log)
    assert 0 == log.delete_old(days=30, max_bytes=1 << 30)


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8), limit=st.integers(1, 1500))
def test_delete_old_leaves_the_newest_that_fit_when_there_is_too_much(
    sizes: list[int], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The rest takes no more than it may, and one conversation more would."""
    from adapters.database import open_database

    log = ConversationLog(open_database(f"sqlite:///{tmp_path_factory.mktemp('log') / 'hotswap.db'}"))
    names = [_keep(log, "x" * size, age_days=len(sizes) - index) for index, size in enumerate(sizes)]
    with log.database.read() as session:
        taken = dict(session.execute(select(ConversationRow.response_id, ConversationRow.size_bytes)).all())
    log.delete_old(days=1000, max_bytes=limit)
    left = _kept(log)
    assert names[len(names) - len(left) :] == left
    assert sum(taken[name] for name in left) <= limit
    if len(left) < len(names):
        assert sum(taken[name] for name in left) + taken[names[-len(left) - 1]] > limit
    log.database.close()


def test_keep_refuses_a_conversation_when_it_is_too_large(log: ConversationLog) -> None:
    """Nothing is cut: half a conversation would be no example of anything."""
    text = "x" * MAX_CONVERSATION_BYTES
    assert not log.keep(Conversation("chatcmpl-large", QUESTION, [], [{"role": "assistant", "content": text}]))
    assert [] == _kept(log)


def test_rated_joins_answer_and_outcome_when_feedback_came(log: ConversationLog) -> None:
    """By alias and metric; what is of another alias, of another metric or not rated does not come."""
    service = ExperimentService(log.database)
    good, other, foreign = _keep(log, "good"), _keep(log, "other"), _keep(log, "foreign", alias="support")
    _keep(log, "unrated")
    for name, metric, value in ((good, "helpful", 1.0), (other, "score", 3.0), (foreign, "helpful", 0.0)):
        service.record_feedback(Feedback(name, metric, value, "why"))
    (found,) = log.rated("legal", "helpful")
    assert (good, "legal@v2", "d" * 64, "stop", "helpful", 1.0, "why") == (
        found.conversation.response_id, found.version, found.digest, found.finish_reason, found.metric, found.value,
        found.comment,
    )  # fmt: skip
    assert [{"role": "assistant", "content": "good"}] == found.conversation.answers
    assert {"helpful": 1, "score": 1} == log.metrics("legal")
    limited = log.database.acting_for(Actor("key-1", aliases=frozenset({"support"})))
    assert [] == ConversationLog(limited).rated("legal", "helpful")


def test_prompt_has_one_name_when_keys_stand_in_another_order() -> None:
    """What was asked is the same, however its objects are written; tools are a part of it."""
    turned = [dict(reversed(message.items())) for message in QUESTION]
    assert prompt_sha256(QUESTION, []) == prompt_sha256(turned, [])
    assert prompt_sha256(QUESTION, []) != prompt_sha256(QUESTION, [{"type": "function"}])
