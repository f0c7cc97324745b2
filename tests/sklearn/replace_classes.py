"""A plugin of pytest: scikit-learn's names of its multilayer perceptrons stand for ours."""

import sklearn.neural_network

import mlpext.sklearn

sklearn.neural_network.MLPClassifier = mlpext.sklearn.MLPClassifier
sklearn.neural_network.MLPRegressor = mlpext.sklearn.MLPRegressor
