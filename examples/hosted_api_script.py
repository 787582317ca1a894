"""Fine-tune a model and talk to it, written as for OpenAI's hosted API.

Nothing in it knows Hotswap: `OPENAI_BASE_URL` says where the API is, the third argument what the base model is called.

    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=unused \
        python examples/hosted_api_script.py examples/support.train.jsonl examples/support.valid.jsonl smollm2-135m
"""

import sys
import time

from openai import OpenAI

POLL_S = 2.0
QUESTION = "My parcel has not come. What can I do?"


def main(train_path: str, validation_path: str, model: str, n_epochs: int = 3) -> None:
    """Upload, create, poll the events, read the result file, chat."""
    client = OpenAI()
    with open(train_path, "rb") as train, open(validation_path, "rb") as validation:  # noqa: PTH123 - as people write it
        training_file = client.files.create(file=train, purpose="fine-tune")
        validation_file = client.files.create(file=validation, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=training_file.id,
        validation_file=validation_file.id,
        suffix="support",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": n_epochs, "batch_size": 4}}},
    )
    print(f"created {job.id}")

    seen: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job.id)
        for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=100).data):
            if event.id not in seen:
                seen.add(event.id)
                print(f"  {event.message}")
        if job.status in ("succeeded", "failed", "cancelled"):
            break
        time.sleep(POLL_S)
    if job.status != "succeeded" or job.fine_tuned_model is None:
        sys.exit(f"the job {job.status}: {job.error}")

    print(client.files.content(job.result_files[0]).text.splitlines()[-1])
    completion = client.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": QUESTION}], max_tokens=24, temperature=0
    )
    print(f"{job.fine_tuned_model}: {completion.choices[0].message.content}")


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
