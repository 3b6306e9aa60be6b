"""LitMoE (module, metrics); what a person sees of a run (monitor, summary, collapse, csv_log); what lets it go on
(checkpoint, saving, bad_steps, run_folder); and the command line (lightning_cli, arguments, commands)."""
