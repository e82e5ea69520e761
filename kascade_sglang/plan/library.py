"""Find the plan for a model: beside its weights, or among those the package ships."""

from pathlib import Path

from kascade_sglang.plan.schema import ModelShape, Plan, PlanError, load_plan

PLAN_NAME = "kascade_plan.json"
SHIPPED = Path(__file__).parent / "data"


def find_plan(model: str, shape: ModelShape, explicit: str | None) -> Plan:
    """Return the plan to serve ``model`` with, checked against its shape.

    explicit: a path the user gave; otherwise ``kascade_plan.json`` in the model's folder, then a
    shipped plan with the model's name. Raises PlanError, saying how to calibrate, if none fits.
    """
    if explicit:
        plan = load_plan(Path(explicit).expanduser())
        plan.check_fits(shape)
        return plan
    beside = Path(model).expanduser() / PLAN_NAME
    if beside.is_file():
        plan = load_plan(beside)
        plan.check_fits(shape)
        return plan
    for path in sorted(SHIPPED.glob("*.json")):
        plan = load_plan(path)
        if plan.model == model:
            plan.check_fits(shape)
            return plan
    raise PlanError(
        f"no Kascade plan for {model}: make one with `kascade calibrate --model {model} "
        "--prompts prompts.txt --anchors 5 --out plan.json` and pass --kascade-plan plan.json"
    )
