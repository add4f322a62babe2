"""What a run shows at its end: one HTML file and one terminal table."""

from nvila_pipelines.report.report import write_report
from nvila_pipelines.report.terminal import render_summary
from nvila_pipelines.report.training_panels import write_plots

__all__ = ["render_summary", "write_plots", "write_report"]
