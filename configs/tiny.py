from minilora.config import Config
config = Config()
