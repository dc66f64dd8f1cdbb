"""What a model's answers are worth: figures beside their references, the graph that category paths form, a judge's verdicts."""
