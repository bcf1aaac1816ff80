"""Other languages than English get a sensible order of kinds, and unknown ones a level in the middle."""

from __future__ import annotations

import json

import pytest

from benchmarks.routing.languages import LANGUAGES, PARALLEL, UNKNOWN, auc, scores_of
from headrace.routing.scoring import languages, normal, prompt_features, scorer, words
from headrace.routing.scoring.lexicon import FEATURES

shipped = scorer.load()


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("part", ["seen", "unseen"])
def test_mathematics_code_and_reasoning_score_above_greetings_and_facts(language: str, part: str) -> None:
    ranks, values = scores_of(shipped, language, part)
    easy = [value for rank, value in zip(ranks, values, strict=True) if rank == 0]
    hard = [value for rank, value in zip(ranks, values, strict=True) if rank == 2]

    assert auc(easy, hard) >= 0.8


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_a_prompt_scores_about_the_same_in_every_language(language: str) -> None:
    rows = [json.loads(line) for line in PARALLEL.read_text(encoding="utf-8").splitlines()]

    shifts = [abs(shipped.score(row[language]).value - shipped.score(row["en"]).value) for row in rows]
    assert sum(shifts) / len(shifts) < 0.1


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_words_of_a_proof_and_of_code_are_found_in_every_language(language: str) -> None:
    rows = [json.loads(line) for line in PARALLEL.read_text(encoding="utf-8").splitlines()]
    for asks, features in (("proof", ("reasoning", "mathematics")), ("code", ("programming",))):
        for row in (row for row in rows if row["asks"] == asks):
            measured = prompt_features.measure(normal.question(row[language]))

            assert all(measured[feature] > 0 for feature in features), (asks, measured)


@pytest.mark.parametrize("language", ["ko", "th", "el", "tr", "he"])
def test_an_unknown_language_is_doubted_and_gets_a_level_in_the_middle(language: str) -> None:
    for prompt in UNKNOWN[language]:
        score = shipped.score(prompt)
        features = {feature.name: feature.value for feature in score.features}

        assert features["doubt"] > 0.5
        assert features["kind:unclear"] > 0.5
        assert 0.35 < score.value < 0.65


def test_structure_and_length_still_count_in_an_unknown_language() -> None:
    short = "Ποια είναι η πρωτεύουσα της Ελλάδας;"
    long = (short + " Γράψε ένα πρόγραμμα με λίστα: ```for i in range(10): print(i)``` ") * 6

    assert shipped.score(long).value > shipped.score(short).value


def test_english_is_not_doubted() -> None:
    for prompt in ("What is the capital of France?", "Define photosynthesis.", "Prove it.", "x^2 = 4"):
        assert "doubt" not in {feature.name for feature in shipped.score(prompt).features}


def test_accents_and_vowel_marks_do_not_change_a_word() -> None:
    assert words.fold("FUNCIÓN Übersetze Ёлка مُعادَلة") == "funcion ubersetze елка معادله"


def test_words_of_scripts_without_spaces_are_about_as_long_as_words() -> None:
    assert len(words.words_of("证明质数有无穷多个")) in range(4, 7)
    assert words.words_of("सिद्ध कीजिए") == ["सिद्ध", "कीजिए"]


def test_every_word_list_belongs_to_a_feature() -> None:
    assert set(languages.FEATURES) <= set(FEATURES) <= set(prompt_features.NAMES)
