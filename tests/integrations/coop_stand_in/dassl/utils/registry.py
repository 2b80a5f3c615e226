class Registry:
    def __init__(self, name):
        self._name = name
        self._obj_map = {}

    def _do_register(self, name, obj, force=False):
        if name in self._obj_map and not force:
            raise KeyError(f"{name} is already registered in {self._name}")
        self._obj_map[name] = obj

    def register(self, obj=None, force=False):
        if obj is not None:
            self._do_register(obj.__name__, obj, force)
            return obj

        def decorate(made):
            self._do_register(made.__name__, made, force)
            return made

        return decorate

    def get(self, name):
        if name not in self._obj_map:
            raise KeyError(f"{name} is not registered in {self._name}")
        return self._obj_map[name]

    def registered_names(self):
        return list(self._obj_map)
