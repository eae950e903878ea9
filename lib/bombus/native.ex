defmodule Bombus.Native do
  @moduledoc false
  # The NIFs of native/bombus_nif. Each returns at once: what takes time comes back as a message
  # {reference, answer} to the caller. This module may be compiled and loaded anew at any time: the
  # library belongs to another, which stays (see `Bombus.Native.Library`).

  alias Bombus.Native.Library

  Module.register_attribute(__MODULE__, :functions, accumulate: true)
  @compile {:no_warn_undefined, :bombus_nif}

  # The same function of the library's module, with the arguments in their order.
  defmacrop nif do
    %{function: {name, arity} = function, versioned_vars: variables} = __CALLER__
    Module.put_attribute(__CALLER__.module, :functions, function)
    ordered = Enum.sort_by(variables, fn {_variable, version} -> version end)
    arguments = for {{name, context}, _} <- ordered, do: {name, [generated: true], context}
    ^arity = length(arguments)
    quote do: library().unquote(name)(unquote_splicing(arguments))
  end

  def load_model(_path, _options, _reference), do: nif()
  def families, do: nif()
  def model_info(_path, _device, _reference), do: nif()
  def save_model(_model, _path, _overwrite, _reference), do: nif()
  def load_adapter(_path, _scale, _reference), do: nif()
  def load_tokenizer(_path, _reference), do: nif()
  def encode(_tokenizer, _prompt, _special, _reference), do: nif()
  def decode(_tokenizer, _ids, _skip, _reference), do: nif()
  def count_tokens(_tokenizer, _prompt, _reference), do: nif()
  def apply_chat_template(_tokenizer, _messages, _options, _reference), do: nif()
  def generate(_model, _tokenizer, _adapter, _group, _prompt, _options, _reference), do: nif()
  # What cancels a generation without keeping it; `cancel` takes both.
  def canceller(_generation), do: nif()
  def cancel(_generation), do: nif()
  # Of a request with a window: so many of its chunks are read.
  def acknowledge(_generation, _chunks), do: nif()
  def score(_model, _ids, _adapter, _timeout, _reference), do: nif()
  def embed(_model, _tokenizer, _adapter, _texts, _wanted, _timeout, _reference), do: nif()

  # {reference, {:ok, :ok}} when what it holds is given back.
  def unload_model(_model, _cancel, _reference), do: nif()
  def unload_adapter(_adapter, _cancel, _reference), do: nif()
  def unload_tokenizer(_tokenizer, _reference), do: nif()
  def memory_info, do: nif()

  # Limits that some requests share, and how many of them have not ended.
  def new_group(_limits), do: nif()
  def group_size(_group), do: nif()
  def close_group(_group), do: nif()

  # Whether an adapter fits a model; {running, waiting} requests of a model.
  def check_adapter(_model, _adapter, _reference), do: nif()
  def requests(_model), do: nif()

  # {:ok, :ok}, or the error of what was unloaded; and what a reference is a handle of, or nil.
  def check_loaded(_model, _tokenizer, _adapter), do: nif()
  def kind(_reference), do: nif()

  # {reference, step} to a process after every step of a model.
  def watch(_model, _pid, _reference), do: nif()

  # Files from the Hub.
  def hide_token(_token), do: nif()
  # `kind` may be :outline: a new folder with a model's files without its weights.
  def fetch(_wanted, _kind, _reference), do: nif()
  def stop_fetch(_download), do: nif()
  def cached(_wanted, _kind, _reference), do: nif()
  def remove_cached(_cache, _id, _reference), do: nif()

  # Files of tensors.
  def open_tensors(_path, _reference), do: nif()
  def read_tensor(_files, _name), do: nif()
  def write_tensors(_path, _entries, _metadata, _reference), do: nif()

  # :quantize, :dequantize and :matmul of arrays {dtype, shape, binary}.
  def quantization(_operation, _arrays, _options, _reference), do: nif()

  # For tests: the next step of a model ends in :panic or :error.
  def fail_next_step(_model, _fault), do: nif()

  @doc false
  # Calls a NIF that answers later, and waits for its answer. What it started is kept until then,
  # since the end of a request's handle is the request's.
  def await(nif, release \\ fn _started -> :ok end) do
    reference = make_ref()

    with {:ok, started} <- nif.(reference) do
      receive do
        {^reference, answer} ->
          release.(started)
          answer
      end
    end
    |> Bombus.Error.from_native()
  end

  @code Library.compile(@functions)

  defp library, do: Library.module!(@code)
end
