"""The soflowctl command line: each command parses, calls one function and prints.

Heavy imports stand inside the commands, so that `--help` answers at once.

main              the commands, and exit codes
sweep_commands    options of run, validate, plan, runs, status, logs, stop, attach and ui
scoring_commands  options of evaluate and compare
options           options that several commands share
terminal          console, tables, progress bars
sweep_file        a sweep file by path or name, checked, with its trials
run               run
shutdown          signals to it, and the loss of its Ray
dry_run           run --dry-run
validate          validate
plan              plan
display           live table and result of a sweep
runs              runs
status            status, logs and stop
attach            attach
detach            run --detach
detached_command  what its job runs
ui                ui
data              data prepare, inspect and verify
doctor            doctor
promote           promote
averages          ema
generate          generate
evaluate          evaluate
compare           compare
report            report
help              help
"""
