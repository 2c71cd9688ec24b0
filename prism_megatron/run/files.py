"""What the files in a run's folder are called."""

from prism_megatron.conversion.checkpoints import folder as checkpoint_folder

METRICS, SUMMARY, REPORT = "metrics.jsonl", "summary.json", "report.html"
RECORD, SAMPLES, CONSOLE = "run.json", "samples.json", "console.log"
CONFIG, CHECKPOINTS, EXPORT = checkpoint_folder.RUN_CONFIG, checkpoint_folder.CHECKPOINTS, checkpoint_folder.EXPORT
