"""What `tools/generate_docs.py` writes into README.md and docs/: one module for each kind of page.

- ``sources``: what the documents are made from (catalogue, classes, results)
- ``figures``: numbers, tables and verdicts as text
- ``inline``: single figures in hand-written sentences, and the verdicts that such sentences rest on
- ``measured``: claims, arms and costs
- ``method_pages``: the generated parts of docs/methods/*.md
- ``indexes``: README's table, docs/methods.md, docs/wings/*.md
- ``few_steps``: the methods for few steps beside each other
- ``reference``: API, pairs of methods and models, benchmarks
- ``documents``: finds the generated parts of a file and writes them anew
"""
