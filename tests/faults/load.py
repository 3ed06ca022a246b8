"""Load without a pause, every answer compared with the undisturbed one: greedy, and seeded with two choices."""

import itertools
import threading

from cluster import tokens_of

MODES = {"greedy": (), "seeded": ("--temperature", "0.9", "--seed", "11", "-n", "2")}

# Prompts of one pass.
SLICE = 8


def prompts():
    return [{"id": str(i), "text": f"Entry {i} of the log: " + "the lamp burned, the wind blew. " * (1 + 7 * (i % 4))}
            for i in range(36)]


class Load(threading.Thread):
    """Asks again and again until told to stop; counts what comes back."""

    def __init__(self, cluster, routers=("router-0",), tokens=60, concurrency=4):
        super().__init__(daemon=True)
        self.cluster, self.routers, self.prompts = cluster, routers, prompts()
        self.tokens, self.concurrency = tokens, concurrency
        self.over = threading.Event()
        self.expected, self.answered, self.wrong, self.lost, self.totals, self.gaps = {}, 0, [], [], [], []

    def ask(self, mode, router, prompts):
        return self.cluster.ask(prompts, router, self.tokens, self.concurrency, MODES[mode])

    def learn(self):
        """The undisturbed answers; before any fault."""
        for mode in MODES:
            answers = self.ask(mode, self.routers[0], self.prompts)
            errors = [answer["error"] for answer in answers.values() if "error" in answer]
            if errors:
                raise SystemExit(f"the undisturbed run failed: {errors[0]}")
            self.expected[mode] = {key: tokens_of(answer) for key, answer in answers.items()}

    def run(self):
        for turn in itertools.count():
            if self.over.is_set():
                return
            mode = list(MODES)[turn % len(MODES)]
            router = self.routers[turn // len(MODES) % len(self.routers)]
            some = [self.prompts[(turn * SLICE + i) % len(self.prompts)] for i in range(SLICE)]
            for key, answer in self.ask(mode, router, some).items():
                self.note(mode, key, answer)

    def note(self, mode, key, answer):
        if "error" in answer:
            self.lost.append((mode, key, answer["error"]))
            return
        self.answered += 1
        if tokens_of(answer) != self.expected[mode][key]:
            self.wrong.append((mode, key, tokens_of(answer), self.expected[mode][key]))
        self.totals.append(answer["timeline"]["total_ms"])
        self.gaps.append(answer["timeline"]["itl_max_ms"])

    def stop(self):
        self.over.set()
        self.join()
