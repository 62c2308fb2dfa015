"""A large language model as the teacher: asked for a label and the words that decide, its answers kept as knowledge.

    python examples/large_model_teacher.py texts.csv --labels negative,positive \\
        --url http://localhost:8000/v1 --model NAME --output knowledge.jsonl
    rekd-train check-teacher knowledge.jsonl --data labelled.csv
    rekd-train run short_texts --set data.name=table --set data.path=labelled.csv \\
        --teacher knowledge.jsonl --output runs/student

Any server that speaks OpenAI's chat protocol will do. texts.csv has a column text, labelled.csv, which need not be
large, also label. An answer that is not as asked is counted and left out. Run again, it asks about what is missing.
"""

import argparse
import csv
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import urllib3
from pydantic import BaseModel, ConfigDict, Field

PROMPT = """Classify the text as one of: {labels}. Answer with JSON only:
{{"label": "...", "confidence": 0.0 to 1.0, "quotes": ["...", "..."]}}
Quote the few words or phrases that decide the label, each copied exactly from the text, at most a tenth of it.

Text: {text}"""


class Answer(BaseModel):
    """What is asked for, and nothing else."""

    model_config = ConfigDict(strict=True, extra="forbid")
    label: str
    confidence: float = Field(ge=0, le=1)
    quotes: list[str] = Field(min_length=1)


class Teacher:
    """A chat endpoint."""

    def __init__(self, url: str, model: str, labels: list[str]) -> None:
        key = os.environ.get("OPENAI_API_KEY")
        self.url, self.model, self.labels = f"{url.rstrip('/')}/chat/completions", model, labels
        self.http = urllib3.PoolManager(
            maxsize=64, timeout=120, headers={"Authorization": f"Bearer {key}"} if key else {},
            retries=urllib3.Retry(4, backoff_factor=0.5, status_forcelist=(429, 502, 503), allowed_methods=None),
        )  # fmt: skip

    def ask(self, text: str) -> dict | str:
        """A row of knowledge, or why the answer is rejected."""
        prompt = PROMPT.format(labels=", ".join(self.labels), text=text)
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        try:
            response = self.http.request("POST", self.url, json=body)
        except urllib3.exceptions.HTTPError as error:
            return f"no answer ({type(error).__name__})"
        if response.status != 200:
            return f"status {response.status}"
        try:
            answer = Answer.model_validate_json(response.json()["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError):
            return "not the JSON that was asked for"
        if answer.label not in self.labels:
            return "a label that is none of them"
        return {"text": text, **answer.model_dump()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="a CSV with the column text")
    parser.add_argument("--labels", required=True, help="the classes, by commas")
    parser.add_argument("--url", required=True, help="the endpoint, up to /v1; its key: OPENAI_API_KEY")
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, default=Path("knowledge.jsonl"))
    parser.add_argument("--at-once", type=int, default=8, help="requests on their way at once")
    given = parser.parse_args()
    with given.texts.open(newline="", encoding="utf-8") as file:
        texts = dict.fromkeys(row["text"] for row in csv.DictReader(file))
    known = given.output.read_text(encoding="utf-8").splitlines() if given.output.exists() else []
    for line in known:
        texts.pop(json.loads(line)["text"], None)

    teacher, rejected = Teacher(given.url, given.model, given.labels.split(",")), Counter[str]()
    with ThreadPoolExecutor(given.at_once) as pool, given.output.open("a", encoding="utf-8") as output:
        for said in pool.map(teacher.ask, texts):
            if isinstance(said, str):
                rejected[said] += 1
            else:
                print(json.dumps(said, ensure_ascii=False), file=output, flush=True)
    print(f"{len(known)} texts were known, {len(texts) - rejected.total()} are new, {rejected.total()} rejected")
    for reason, count in rejected.most_common():
        print(f"{count}: {reason}")


if __name__ == "__main__":
    main()
