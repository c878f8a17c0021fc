"""Copy the domain corpora, with a space between `Answer:` and the completion that follows it.

    python recipes/text/prepare.py ../shared/data runs/text/data

The question-and-answer sets end their prompts with a colon and start their completions without a
space. A trainer joins the two, and "Answer:The" is not how anybody writes.
"""

import json
import sys
from pathlib import Path

DOMAINS = ("math", "code", "medicine", "law", "german", "french", "general", "science")

if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    for domain in DOMAINS:
        (target / domain).mkdir(parents=True, exist_ok=True)
        for split in ("train", "valid", "test"):
            changed = 0
            lines = (source / domain / f"{split}.jsonl").read_text().split("\n")
            with open(target / domain / f"{split}.jsonl", "w") as out:
                for row in map(json.loads, filter(None, lines)):
                    if row["prompt"].endswith(":") and not row["completion"][0].isspace():
                        row["completion"] = " " + row["completion"]
                        changed += 1
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(f"{domain}/{split}: a space before {changed} completions")
