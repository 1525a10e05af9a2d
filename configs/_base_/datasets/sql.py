# Questions about tables to SQL. https://huggingface.co/datasets/b-mc2/sql-create-context
dataset = dict(source='b-mc2/sql-create-context', map_fn='sql', max_length=2048)
