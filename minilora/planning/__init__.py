"""`--plan`: what a run or an answer needs, computed without weights and without a GPU."""
