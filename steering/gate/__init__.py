"""The tool gate's parts; `steering.toolgate` is the machine that they serve."""
