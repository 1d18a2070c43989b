Part = None
