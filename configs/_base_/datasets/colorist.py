# Names of colours to their codes. https://huggingface.co/datasets/burkelibbey/colors
dataset = dict(source='burkelibbey/colors', map_fn='colors', max_length=2048)
