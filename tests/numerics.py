"""Thousands of drawn cases, each held to its error budget, and the tables of docs/project/numerics.md. `make numerics`
runs it.

A case is drawn from its number alone (tests/campaign). Each verdict is written when it is there (a line of JSON in
build/numerics/, in a file that is named by the code that is tested), so that a run that was stopped goes on where it
was. Then the tables are written.

    make numerics                                    # every family, to its end
    make numerics ARGS='--family head --seconds 600' # ten minutes of one of them
    make numerics ARGS='--case head:1234'            # one case, shown and not kept
"""

from __future__ import annotations

import argparse
import datetime
import time

import pages
import torch
from campaign import backward, heads, losses
from campaign.frame import ROOT, Family, Verdict, judged, kept, table

from groupdpo_kernels.cli.inspection import units, units_line

PAGE = ROOT / "docs" / "project" / "numerics.md"
FAMILIES: dict[str, Family] = {family.name: family for family in (heads.FAMILY, losses.FAMILY, backward.FAMILY)}


def run(family: Family, cases: int, until: float) -> dict[int, Verdict]:
    """The verdicts on the first `cases` of a family, or those that are there by `until` (of time.monotonic)."""
    path = ROOT / "build" / "numerics" / f"{family.name}-{family.digest()}.jsonl"
    found = kept(path)
    missing = [number for number in range(cases) if number not in found]
    began = said = time.monotonic()
    for done, verdict in enumerate(judged(family, missing, path), 1):
        found[verdict.case] = verdict
        now = time.monotonic()
        if verdict.failed:
            print(f"{family.name} {verdict}", flush=True)
        if now - said > 10 or done == len(missing):
            worst = max(found.values(), key=lambda verdict: verdict.worst)
            left = (now - began) / done * (len(missing) - done) / 60
            print(
                f"{family.name}: {len(found)} of {cases} cases, {sum(v.failed for v in found.values())} failed, "
                f"worst {worst.worst:.3f} (case {worst.case}), {left:.0f} min left",
                flush=True,
            )
            said = now
        if now > until:
            break
    return {number: verdict for number, verdict in found.items() if number < cases}


def report(family: Family, found: dict[int, Verdict]) -> str:
    """What stands between a family's marks on the page."""
    failed = sum(verdict.failed for verdict in found.values())
    minutes = sum(verdict.seconds for verdict in found.values()) / 60
    head = (
        f"`make numerics ARGS='--family {family.name}'` at commit {pages.commit()}, {datetime.date.today()}, torch "
        f"{torch.__version__}; {units_line(units())}. {len(found)} of {family.count} cases in {minutes:.0f} minutes, "
        f"**{failed} beyond the budget**."
    )
    return f"{family.title}\n\n{head}\n\n{table(family, found)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="one family; without it all of them")
    parser.add_argument("--cases", type=int, help="the first so many cases of each family; without it all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many, and go on next time")
    parser.add_argument("--case", metavar="FAMILY:NUMBER", help="this case alone; its verdict is not kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        name, _, number = options.case.partition(":")
        print(FAMILIES[name].draw(int(number)))
        print(verdict := FAMILIES[name].verdict(int(number)))
        return int(verdict.failed)
    until, failed = time.monotonic() + options.seconds, 0
    for family in [FAMILIES[options.family]] if options.family else FAMILIES.values():
        found = run(family, min(family.count, options.cases or family.count), until)
        pages.write(PAGE, f"make numerics, {family.name}", report(family, found))
        failed += sum(verdict.failed for verdict in found.values())
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
