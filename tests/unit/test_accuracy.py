"""The comparison of lm-eval's scores with re-routing off and on, and the paper's suites, as far as no hub is asked."""

# ruff: noqa: RUF001 - Chinese has its own punctuation

import json

import lm_eval
import pytest
from datasets import Dataset, DatasetDict
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from sere_dist.evaluation.accuracy import check, compare, find_suite, leaf_tasks, open_suite

CODE = {"sere_paper": ["humaneval", "mbpp"], "sere_paper_chat": ["humaneval_instruct", "mbpp_instruct"]}
EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    name, manager = open_suite(find_suite("paper"))
    assert name == "sere_paper"
    return manager


@pytest.mark.long
@pytest.mark.parametrize("suite", CODE)
def test_the_papers_tasks_generate(manager, suite):
    tasks = dict(leaf_tasks(manager, suite))
    parts = {"gsm8k": 1, "minerva_math": 7, "humaneval": 1, "mbpp": 1, "bbh": 27, "boolq": 1, "cmmlu": 67}
    assert {part: sum(task.startswith(part) for task in tasks) for part in parts} == parts
    assert len(tasks) == sum(parts.values())
    check(tasks, run_model_code=True)
    with pytest.raises(ValueError, match=f"{', '.join(CODE[suite])}: runs what the model writes"):
        check(tasks, run_model_code=False)


@pytest.mark.long
def test_tasks_that_score_the_prompt_are_refused(manager):
    for name in ("boolq", "cmmlu"):
        with pytest.raises(ValueError, match=f"{name}.*: output_type is not generate_until"):
            check(dict(leaf_tasks(manager, name)), run_model_code=False)
    with pytest.raises(ValueError, match="has no task heldout"):
        dict(leaf_tasks(manager, "heldout"))


class Says(LM):
    """Answers questions by heart."""

    def __init__(self, answers: dict[str, str]):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answers[request.args[0]] for request in requests]

    loglikelihood = loglikelihood_rolling = None


def test_a_groups_difference_is_of_its_documents(tmp_path):
    """Three questions of one task and two of another, of which re-routing turns one to right and one to wrong."""
    for name, questions in (("first", "abc"), ("second", "de")):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"question": question} for question in questions]))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.json")}}}
        task = {"task": name, "output_type": "generate_until", "test_split": "test", "metric_list": [EXACT]}
        task |= {"doc_to_text": "{{question}}", "doc_to_target": "yes", "num_fewshot": 0}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task | data))  # JSON is YAML
    group = {"group": "both", "task": ["first", "second"], "aggregate_metric_list": [{"metric": "exact_match"}]}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def run(*said: str) -> dict:
        answers = dict(zip("abcde", said, strict=True))
        return lm_eval.evaluate(Says(answers), manager.load(["both"]))

    off, on = run("yes", "no", "yes", "no", "yes"), run("yes", "yes", "no", "oh no", "yes")
    (row,) = compare(off, on, "both")
    assert (row["documents"], row["off"], row["on"], row["difference"]) == (5, 0.6, 0.6, 0)
    assert row["difference_stderr"] == pytest.approx((2 / 4 / 5) ** 0.5)
    assert row["other_answers"] == 0.6
    (row,) = compare(off, on, "first")
    assert (row["documents"], row["off"], row["difference_stderr"]) == (3, pytest.approx(2 / 3), pytest.approx(3**-0.5))


QUESTIONS = {
    "boolq_cot": {"passage": "Water boils at 100 degrees.", "question": "does water boil", "label": 1},
    "cmmlu_cot": {"Question": "水在多少度沸腾？ ", "A": "10", "B": "50", "C": "100", "D": "200", "Answer": "C"},
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "answer", "right"),
    [
        ("boolq_cot", " It says so.\nAnswer: yes", True),
        ("boolq_cot", " Answer: no? It says so. **Answer:** Yes.", True),
        ("boolq_cot", " So the answer is no.", False),
        ("boolq_cot", " yes", False),
        ("cmmlu_cot", "水在一百度沸腾。\n答案：C", True),
        ("cmmlu_cot", "答案：A？不对。因此**答案是 (C)**。", True),
        ("cmmlu_cot", "答案：D", False),
        ("cmmlu_cot", "C", False),
    ],
)
def test_what_counts_as_an_answer(manager, monkeypatch, name, answer, right):
    data = Dataset.from_list([QUESTIONS[name]])
    splits = DatasetDict(dict.fromkeys(("validation", "dev", "test"), data))
    monkeypatch.setattr("datasets.load_dataset", lambda **_: splits)
    task = next(iter(manager.load([name])["tasks"].values()))
    task.build_all_requests()
    (request,) = task.instances
    prompt, _settings = request.args
    assert all(str(part) in prompt for key, part in QUESTIONS[name].items() if key not in ("label", "Question"))
    request.resps.append(answer)
    task.apply_filters()
    assert task.process_results(task.eval_docs[0], [request.filtered_resps["last-answer"]]) == {"exact_match": right}
