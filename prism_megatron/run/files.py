"""What the files in a run's folder are called."""

METRICS, SUMMARY, REPORT, CONFIG = "metrics.jsonl", "summary.json", "report.html", "config.yaml"
RECORD, SAMPLES, CONSOLE = "run.json", "samples.json", "console.log"
CHECKPOINTS, EXPORT = "checkpoints", "hf"
