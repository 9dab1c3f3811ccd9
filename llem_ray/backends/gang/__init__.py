"""How the processes of a gang divide a model, and how they talk to each other: for every engine that does both."""
