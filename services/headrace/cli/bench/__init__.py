"""`headrace bench`: send load to a mesh, or to any server with OpenAI's API, and measure the answers.

`prompts` and `synthetic` make the prompts, `arrivals` plans when they are sent, and `load` sends them through
one of the `backends`, which records when tokens arrive in a `Record`. `figures` summarizes the records with
the names of `vllm bench serve`, `objectives` judges the summary, and `report` and `plot` show it. `bench`
calls all of these.
"""
