"""Bits per dimension in results; `evaluation.bits` computes them, since a likelihood needs the model."""

from lightning_tdisent.metrics.metric import Column, Metric

HOW, REFUSED = "bpd_how", "bpd_refused"  # keys of a row: how its bits were measured, and why there are none
PARTS = ("low", "high", "terms", "images")


class Bound(Metric):
    """Variational upper bound on the negative log-likelihood in bits per dimension."""

    name = "bpd"
    needs = "likelihood"
    asked_by = "asked for by --metrics of evaluate, or by bits: of a study"
    columns = (Column("bpd", "bits per dimension, upper bound", "lower", with_features=False, parts=PARTS),)


class ByODE(Metric):
    """Negative log-likelihood in bits per dimension by integration of the probability flow ODE: an estimate."""

    name = "bpd_ode"
    needs = "likelihood"
    asked_by = "asked for by --metrics of evaluate, or by bits: of a study"
    columns = (Column("bpd_ode", "bits per dimension, by the ODE", "lower", with_features=False, parts=PARTS),)


BOUND, ODE = Bound.columns[0], ByODE.columns[0]
OF_IMAGES = [column.key(part=part) for column in (BOUND, ODE) for part in ("terms", "images")]  # no single numbers
KEYS = {HOW, REFUSED, *BOUND.names(), *ODE.names()}  # every key of a row that is about bits
