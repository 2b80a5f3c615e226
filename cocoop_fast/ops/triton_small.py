"""The operations of :class:`cocoop_fast.ops.table.SmallOps` by the Triton kernels. Importing this module imports Triton."""

from __future__ import annotations

from cocoop_fast.kernels import meta_net, step_report

WIDEST = meta_net.WIDEST
MOST_GRADIENTS = step_report.MOST_GRADIENTS

unit_rows = meta_net.unit_rows
meta_net_fwd = meta_net.meta_net_fwd
meta_net_bwd = meta_net.meta_net_bwd
step_report = step_report.step_report  # type: ignore[assignment]
